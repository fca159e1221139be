"""The classes: Han characters in common use."""

from distill_jax.errors import UserError


def level_1() -> tuple[str, ...]:
    """The 2,965 characters of JIS X 0208 level 1, in its order (by their reading)."""
    rows, cells = range(0xB0, 0xD0), range(0xA1, 0xFF)  # row 47 ends early
    codes = (bytes([row, cell]) for row in rows for cell in cells)
    return tuple(text for code in codes if (text := code.decode("euc_jp", "ignore")))


def common() -> tuple[str, ...]:
    """Those 1,759 of level 1 that mainland China (GB 2312) and Taiwan (Big5) write too."""
    return tuple(c for c in level_1() if _within(c, "gb2312") and _within(c, "big5"))


def first(number: int) -> tuple[str, ...]:
    """The first characters of `common`; of all of level 1, if there are not that many.

    Raises:
        UserError: for fewer than 2 characters, or more than level 1 has.
    """
    every, shared = level_1(), common()
    if not 2 <= number <= len(every):
        raise UserError(f"--characters={number}: expected 2 to {len(every)}")
    return (shared if number <= len(shared) else every)[:number]


def _within(character: str, encoding: str) -> bool:
    return bool(character.encode(encoding, "ignore"))
