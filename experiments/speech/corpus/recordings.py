"""Recordings with transcripts: the result of every reader of a corpus.

A recording has a function that reads its audio, so that a list of all recordings is small and can be
sent to worker processes. `to_mono_16k` converts the audio to 16 kHz mono and notes what it changed.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from distill_jax.errors import UserError

RATE = 16000  # Hz
# What -1..1 is scaled to. A little below full scale: resampling overshoots at steep edges.
SCALE = 32000
NO_SAMPLES, NOT_FINITE = "no samples", "samples that are not finite"

Audio = tuple[np.ndarray, int]
"""float32 `[samples]` or `[samples, channels]` in -1..1, and the sampling rate in Hz."""


class Recording(NamedTuple):
    """One utterance.

    id: unique in its corpus. speaker: "" if not known. scene: recordings of one scene stay in
    one split (a dialogue, a chapter). split: "train", "validation" or "test", or "" if the corpus has
    none. text: the transcript as written. read: returns the audio; can be pickled.
    """

    id: str
    speaker: str
    scene: str
    split: str
    text: str
    read: Callable[[], Audio]


def to_mono_16k(samples: np.ndarray, rate: int) -> tuple[np.ndarray, list[str]]:
    """Averages the channels, resamples to `RATE` and rounds to 16 bits.

    Args:
        samples: floating point `[samples]` or `[samples, channels]` in -1..1.
        rate: sampling rate in Hz.

    Returns:
        int16 `[n]`, 1.0 as `SCALE`, and notes on what was changed; equal changes have equal notes.
        Audio without samples or with NaN or infinity gives `[0]` and
        the note `NO_SAMPLES` or `NOT_FINITE` alone: one bad recording should not end a long run.
    """
    if not samples.size:
        return np.zeros(0, np.int16), [NO_SAMPLES]
    if not np.isfinite(samples).all():
        return np.zeros(0, np.int16), [NOT_FINITE]
    notes = []
    if samples.ndim == 2:
        channels = samples.shape[1]
        samples = samples.mean(axis=1)
        if channels > 1:
            notes.append(f"{'stereo' if channels == 2 else f'{channels} channels'} mixed to mono")
    if rate != RATE:
        samples = soxr.resample(samples, rate, RATE)
        notes.append(f"resampled from {rate} Hz")
    return (samples * SCALE).clip(-32768, 32767).astype(np.int16), notes


def read_file(path: str | os.PathLike[str]) -> Audio:
    """The audio of a whole file in any format of libsndfile (WAV, FLAC, Ogg, MP3, ...).

    Raises:
        UserError: if the file can't be read or ends early; the message names it.
    """
    try:
        return decode(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def decode(content: bytes, what: str) -> Audio:
    """The audio in the bytes of a file; `what` names it in messages.

    Raises:
        UserError: if it isn't audio, is damaged or ends early.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            samples = file.read(dtype="float32")
            # MP3 doesn't store its length; the number is a guess.
            expected = len(samples) if file.subtype.startswith("MPEG") else file.frames
            rate = file.samplerate
    except soundfile.SoundFileError as error:
        raise UserError(f"{what}: not readable as audio ({error})") from error
    if len(samples) != expected:
        raise UserError(f"{what}: damaged, {len(samples)} of {expected} samples can be read")
    return samples, rate
