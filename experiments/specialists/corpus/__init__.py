"""From typefaces to the data set `glyphs`."""
