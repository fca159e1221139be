"""Word errors: counted by utterance, and the rates of all."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from distill_jax.errors import UserError

KINDS = ("substitutions", "deletions", "insertions")


def count(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, np.ndarray]:
    """Counts the word errors of U utterances, by an alignment of each with the fewest errors.

    Fillers such as "<sil>" or "[NOISE]" and marks of alternative pronunciations, as in "read(2)", are
    removed from the hypotheses first.

    Args:
        references: the correct words of each utterance, separated by spaces.
        hypotheses: the decoded words of each utterance.

    Returns:
        int64 `[U]` each: "words" (of the references), "substitutions", "deletions" and "insertions".

    Raises:
        UserError: if the numbers of utterances differ, if the references have no words, or if jiwer is
            not installed.
    """
    if len(references) != len(hypotheses):
        raise UserError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    try:
        import jiwer
    except ImportError as error:
        raise UserError(
            "counting word errors needs the package jiwer: pip install -e '.[speech]'"
        ) from error
    words = np.array([len(reference.split()) for reference in references], np.int64)
    if not words.sum():
        raise UserError("the references have no words")
    found = jiwer.process_words(list(references), [_spoken(words) for words in hypotheses])
    counts = {"words": words, **{kind: np.zeros_like(words) for kind in KINDS}}
    kinds = {"substitute": "substitutions", "delete": "deletions", "insert": "insertions"}
    for utterance, chunks in enumerate(found.alignments):
        for chunk in chunks:
            said = chunk.ref_end_idx - chunk.ref_start_idx
            if chunk.type in kinds:
                decoded = chunk.hyp_end_idx - chunk.hyp_start_idx
                counts[kinds[chunk.type]][utterance] += max(said, decoded)
    return counts


def total(counts: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The sums of `count` over utterances, and "word_error_rate", the errors per 100 words."""
    sums = {name: int(each.sum()) for name, each in counts.items()}
    return {**sums, "word_error_rate": 100 * sum(sums[kind] for kind in KINDS) / sums["words"]}


def by_utterance(counts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The errors of each utterance `[U]`, of all kinds.

    Examples:
        >>> print(by_utterance(count(["a b c", "d"], ["a x c d", "d"])))
        [2 0]
    """
    return sum((counts[kind] for kind in KINDS), np.zeros_like(counts["words"]))


def _spoken(hypothesis: str) -> str:
    words = re.sub(r"\(\d+\)(?=\s|$)", "", hypothesis).split()
    return " ".join(word for word in words if not re.fullmatch(r"<.*>|\[.*\]|\+\+.*\+\+", word))
