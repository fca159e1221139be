"""The language model of a decoder: trigrams of transcripts, and pronunciations of their words."""

import functools
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from distill_jax.errors import UserError
from experiments.speech import sphinx


class LanguageModel(NamedTuple):
    """Two files of a decoder. trigrams: an ARPA file. dictionary: the pronunciation of every word."""

    trigrams: Path
    dictionary: Path


def vocabulary() -> frozenset[str]:
    """The words of the wheel's dictionary, in lower case, without alternative pronunciations."""
    return frozenset(word for word, _ in _pronunciations())


def write(sentences: Iterable[Sequence[str]], directory: Path) -> LanguageModel:
    """Makes the language model of a decoder from transcripts.

    The dictionary has only the words of the trigrams: the decoder can find no others, and starts in a
    quarter of the time.

    Args:
        sentences: words in lower case; see `write_trigrams`.
        directory: created if missing; gets trigrams.arpa and words.dict.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model = in_directory(directory)
    write_dictionary(write_trigrams(sentences, model.trigrams), model.dictionary)
    return model


def in_directory(directory: Path) -> LanguageModel:
    """The language model that `write` put there."""
    return LanguageModel(directory / "trigrams.arpa", directory / "words.dict")


def write_trigrams(sentences: Iterable[Sequence[str]], path: Path) -> set[str]:
    """Counts trigrams and writes them as an ARPA file.

    Half of the probability of every history backs off to shorter histories (the fixed discount of
    `pocketsphinx.lm.ArpaBoLM`).

    Args:
        sentences: words in lower case. A sentence without words, or with a word outside `vocabulary()`,
            is not counted: the decoder could not find that word.
        path: of the file.

    Returns:
        The words counted.

    Raises:
        UserError: no sentence is left.
    """
    known = vocabulary()
    kept = [words for words in sentences if len(words) and known.issuperset(words)]
    if not kept:
        raise UserError(
            f"{path}: no sentence to count: none has all its words in {sphinx.dictionary()}"
        )
    from pocketsphinx.lm import ArpaBoLM

    model = ArpaBoLM(text="\n".join(" ".join(words) for words in kept), add_start=True)
    model.compute()
    with path.open("w", encoding="utf-8") as file:
        model.write(file)
    return {word for words in kept for word in words}


def write_dictionary(words: Collection[str], path: Path) -> None:
    """Writes the pronunciations of `words` that the wheel's dictionary has, in its order."""
    lines = [line for word, line in _pronunciations() if word in words]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@functools.cache
def _pronunciations() -> list[tuple[str, str]]:
    """Pairs of a word and a line of the wheel's dictionary."""
    lines = sphinx.dictionary().read_text(encoding="utf-8").splitlines()
    return [(re.sub(r"\(\d+\)$", "", line.split(maxsplit=1)[0]), line) for line in lines]
