"""Draws characters of a typeface as 32 x 32 grey levels."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 32  # pixels
_INK = 28  # pixels that the ink of a typical character of the typeface spans
_EM, _CANVAS = 112, 176  # drawn at four times the size, with room for what sticks out
_FITTED = 40  # characters that the place and size of a typeface's ink are measured on
_STEP = 17  # 16 grey levels, which compress to half the size of 256


def render(path: Path, number: int, characters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Draws the characters of a face, white on black, its typical character spanning 28 pixels.

    One scale and one offset for the whole face: small and low characters stay small and low.

    Args:
        path: font file.
        number: of the face in the file.
        characters: n of them.

    Returns:
        uint8 `[n, 32, 32]`, multiples of 17; and bool `[n]`: false for a character that the face
        has no glyph for, draws as its mark for a missing one, or leaves blank.
    """
    font = ImageFont.truetype(path, _EM, index=number, layout_engine=ImageFont.Layout.BASIC)
    box = _box(font, characters[:: max(1, len(characters) // _FITTED)])
    missing = _draw(font, "\uffff").tobytes()  # no character, so every face lacks it
    glyphs = np.zeros((len(characters), SIZE, SIZE), np.uint8)
    drawn = np.zeros(len(characters), bool)
    for place, character in enumerate(characters):
        image = _draw(font, character)
        if image.getbbox() is None or image.tobytes() == missing:
            continue
        small = image.resize((SIZE, SIZE), Image.Resampling.BOX, box=box)
        levels = np.rint(np.asarray(small) / _STEP).astype(np.uint8)
        glyphs[place], drawn[place] = levels * _STEP, levels.any()
    return glyphs, drawn


def _draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    image = Image.new("L", (_CANVAS, _CANVAS))
    middle = (_CANVAS / 2, _CANVAS / 2)
    # A glyph whose program is faulty counts as blank.
    with contextlib.suppress(OSError):
        ImageDraw.Draw(image).text(middle, character, fill=255, font=font, anchor="mm")
    return image


def _box(
    font: ImageFont.FreeTypeFont, characters: Sequence[str]
) -> tuple[float, float, float, float]:
    """The square of the canvas to be scaled to 32 pixels, by the median ink of some characters."""
    boxes = [box for c in characters if (box := _draw(font, c).getbbox())]
    if not boxes:
        return (0, 0, _CANVAS, _CANVAS)
    left, top, right, bottom = np.array(boxes, float).T
    half = np.median(np.maximum(right - left, bottom - top)) * SIZE / _INK / 2
    x, y = np.median(left + right) / 2, np.median(top + bottom) / 2
    corners = np.clip([x - half, y - half, x + half, y + half], 0, _CANVAS)
    return tuple(corners.tolist())
