"""Forced alignment: which tied HMM state (senone) each frame of a recording is in, given its words.

By pocketsphinx with the acoustic model of its own wheel. It aligns twice: words first, which inserts
silences and picks pronunciations, then the phones and states within them.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pocketsphinx import Decoder

from distill_jax.errors import UserError

# So wide that no path is lost: an alignment is wanted of every recording.
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
        words: in the dictionary's spelling; `unknown_words` tells those that it lacks.

    Returns:
        The alignment, or None if there is no path through the words: the recording is too short for
        them, or there are none. Other words than those spoken are aligned as well as they go.
    """
    if not len(samples) or not words:
        return None
    decoder = _decoder()
    decoder.reinit_feat()  # forgets the last recording's noise, so that the order doesn't matter
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
    """Those words that the aligner's dictionary lacks."""
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
