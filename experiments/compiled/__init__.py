"""Programs compiled for machines that aren't there: whether they fit, and what they send."""
