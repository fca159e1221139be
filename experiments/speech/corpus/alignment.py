"""Forced alignment: the tied HMM state (senone) of each frame of a recording, given its words.

It uses pocketsphinx with the acoustic model of its wheel, and aligns twice: first the words, which
inserts silences and selects pronunciations, then the phones and states within them.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pocketsphinx import Decoder

from distill_jax.errors import UserError

# So wide that no path is lost: every recording needs an alignment.
_BEAMS = {"beam": 1e-200, "wbeam": 1e-200, "pbeam": 1e-200}


class Alignment(NamedTuple):
    """states: int32 `[n]`, senones by frame of 10 ms. segments: words and fillers such as "<sil>", with
    their first frames `starts` int32 `[len(segments)]`."""

    states: np.ndarray
    segments: tuple[str, ...]
    starts: np.ndarray


NOTHING = Alignment(np.zeros(0, np.int32), (), np.zeros(0, np.int32))


def align(samples: np.ndarray, words: Sequence[str]) -> Alignment | None:
    """Aligns a recording with its words.

    Args:
        samples: int16 `[samples]` at 16 kHz.
        words: in the spelling of the dictionary; `unknown_words` lists those that it lacks.

    Returns:
        The alignment, or None if there is no path through the words: the recording is too short for
        them, or there are no words. Words that were not spoken are aligned as well as possible.
    """
    if not len(samples) or not words:
        return None
    decoder = _decoder()
    decoder.reinit_feat()  # resets the noise estimate, so that the order of recordings does not matter
    audio = samples.tobytes()
    try:
        decoder.set_align_text(" ".join(words))
        _decode(decoder, audio)
        if decoder.hyp() is None:
            return None
        decoder.set_alignment()
        _decode(decoder, audio)
        aligned = decoder.get_alignment()
    except RuntimeError:  # what it raises where no path through the words is found
        return None
    if aligned is None:
        return None
    segments, starts = [], []
    states: list[int] = []
    for word in aligned:
        segments.append(word.name)
        starts.append(len(states))
        for phone in word:
            for state in phone:
                states += [int(state.name)] * state.duration  # a state's name is its senone
    return Alignment(np.array(states, np.int32), tuple(segments), np.array(starts, np.int32))


def unknown_words(words: Sequence[str]) -> list[str]:
    """The words that the aligner's dictionary lacks."""
    decoder = _decoder()
    return [word for word in words if decoder.lookup_word(word) is None]


@functools.cache
def _decoder() -> Decoder:
    """One aligner per process."""
    try:
        return Decoder(lm=None, loglevel="FATAL", bestpath=False, dither=False, **_BEAMS)
    except RuntimeError as error:
        raise UserError(
            f"pocketsphinx has no acoustic model to align with ({error}): install its wheel, which "
            "carries one, by: pip install pocketsphinx"
        ) from error


def _decode(decoder: Decoder, audio: bytes) -> None:
    decoder.start_utt()
    decoder.process_raw(audio, no_search=False, full_utt=True)
    decoder.end_utt()
