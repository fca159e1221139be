"""Transcripts as the words that are spoken: lower case, numbers written out, no punctuation."""

import re
import unicodedata

from num2words import num2words

# 1,844 is one number; "13th" is an ordinal.
_NUMBER = re.compile(r"(\d{1,3}(?:,\d{3})+|\d+)(st\b|nd\b|rd\b|th\b)?")
# num2words has names up to 10^306; no transcript has more than a few digits in one number.
_DIGITS_IN_A_NUMBER = 15
_APOSTROPHES = str.maketrans(dict.fromkeys("\x92\u2019\u02bc`", "'"))
# Apostrophes at a word's ends are quotes, except in words that are spelled with them ('em, goin',
# gangsters').
_OPENING_QUOTE = re.compile(r"^'+(?!(?:em|til|cause|cos|bout|round)\b)")
_CLOSING_QUOTE = re.compile(r"(?<!in)(?<!an)(?<!s)'+$")


def words(text: str) -> list[str]:
    """The words of a transcript: letters a to z and apostrophes inside or in place of letters.

    Accents are removed; hyphens and all other characters separate words.
    """
    plain = unicodedata.normalize("NFKD", text.translate(_APOSTROPHES)).lower()
    plain = "".join(character for character in plain if not unicodedata.combining(character))
    spelled = re.sub(r"[^a-z']+", " ", _NUMBER.sub(_number_words, plain))
    unquoted = (_CLOSING_QUOTE.sub("", _OPENING_QUOTE.sub("", word)) for word in spelled.split())
    return [word for word in unquoted if word.strip("'")]


def _number_words(match: re.Match[str]) -> str:
    digits, ending = match[1].replace(",", ""), match[2]
    if len(digits) > _DIGITS_IN_A_NUMBER:
        spoken = " ".join(num2words(int(digit)) for digit in digits)
    else:
        spoken = num2words(int(digits), to="ordinal" if ending else "cardinal")
    return f" {spoken} ".replace(",", "")
