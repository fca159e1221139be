"""Log-mel filter-bank energies, and their normalised form in bytes (section 4: 40, each 10 ms)."""

from typing import NamedTuple

import kaldi_native_fbank as kaldi
import numpy as np

from distill_jax.errors import UserError
from experiments.speech.corpus.recordings import RATE
from experiments.speech.speech_frames import NUM_MELS

# A byte is ZERO + STEPS * (deviations from the mean): -12.8 to 12.7 in steps of a tenth, whose rounding
# adds a thousandth of the variance. Finer steps compress worse without any gain.
ZERO, STEPS = 128, 10


class Bands(NamedTuple):
    """Edges of the mel filter bank, in Hz."""

    low: float = 64.0
    high: float = 7600.0


def log_mels(samples: np.ndarray, bands: Bands) -> np.ndarray:
    """Log energies of 40 mel bands in windows of 25 ms, every 10 ms.

    Args:
        samples: int16 `[samples]` at 16 kHz.
        bands: edges of the filter bank.

    Returns:
        float32 `[n, 40]`, 0 or more, `n = (samples - 240) // 160` or 0 where there are fewer than
        400.

    Raises:
        UserError: for invalid bands: too narrow, or above 8000 Hz.
    """
    options = kaldi.FbankOptions()
    options.frame_opts.samp_freq = RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "hamming"
    options.mel_opts.num_bins = NUM_MELS
    options.mel_opts.low_freq, options.mel_opts.high_freq = bands
    try:
        bank = kaldi.OnlineFbank(options)
    except ValueError as error:
        raise UserError(
            f"no 40 mel bands lie between {bands.low} and {bands.high} Hz ({error})"
        ) from error
    bank.accept_waveform(RATE, samples.astype(np.float32))
    bank.input_finished()
    frames = [bank.get_frame(i) for i in range(bank.num_frames_ready)]
    if not frames:
        return np.zeros((0, NUM_MELS), np.float32)
    # Rounding noise of 16 bits is above 0. Digital silence would be at -16, so far below all sound that
    # a few per cent of it would determine the deviation, and so the step size.
    return np.maximum(np.stack(frames), 0.0)


def quantise(log_mels: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Normalises to bytes: each utterance minus its own mean, divided by the deviation of the set.

    Args:
        log_mels: float32 `[n, 40]` of one utterance.
        deviation: `[40]`, of the training frames after subtracting the utterance means.

    Returns:
        uint8 `[n, 40]`; `(value - ZERO) / STEPS` is in deviations.
    """
    normalised = (log_mels - log_mels.mean(axis=0)) / deviation
    return np.clip(np.rint(ZERO + STEPS * normalised), 0, 255).astype(np.uint8)
