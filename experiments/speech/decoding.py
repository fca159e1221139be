"""Decoding: from a net's log-probabilities of states to words.

The scores are those of a hybrid system (section 4 of the paper): the log-probability of a state minus
its log prior replaces the log-likelihood of a frame. This module uses no JAX: its inputs are NumPy
arrays, and the decoders run in threads that release the interpreter's lock.
"""

import contextlib
import os
import queue
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from distill_jax.errors import UserError
from experiments.speech import sphinx, word_errors
from experiments.speech.language_model import LanguageModel


class Weights(NamedTuple):
    """Weights that are tuned on validation utterances.

    acoustic_scale: factor on the senone scores.
    prior_scale: factor on the log prior, which is subtracted.
    language_weight: factor on the log-probability of the language model.
    word_insertion_penalty: a factor per word; below 1 for fewer words.
    """

    acoustic_scale: float = 1.0
    prior_scale: float = 1.0
    language_weight: float = 6.5
    word_insertion_penalty: float = 0.65


class Search(NamedTuple):
    """How the decoder prunes its search.

    beam, phone_beam, word_beam: states, ends of phones and ends of words are dropped if they are worse
        than the best by more than this factor.
    max_states, max_words: kept per frame; -1 for all.
    second_pass: whether to search again, over a flat lexicon of the words that were found.
    best_path: whether the result is the best path through the lattice, or the path of the search.
    """

    beam: float = 1e-48
    phone_beam: float = 1e-48
    word_beam: float = 7e-29
    max_states: int = 30000
    max_words: int = -1
    second_pass: bool = True
    best_path: bool = True


WIDE = Search()
FAST = Search(max_states=2000, max_words=20, second_pass=False)
"""Twice as fast as WIDE, for up to 2 more errors in 100 words."""

START = Weights(acoustic_scale=2.0, prior_scale=0.7)
"""Near the optimum for a net. With a lower acoustic scale the beams prune less, which is slower."""

GRID: Mapping[str, Sequence[float]] = {
    "acoustic_scale": (1.0, 1.4, 2.0, 2.8),
    "prior_scale": (0.4, 0.7, 1.0),
    "language_weight": (4.5, 6.5, 8.5),
    "word_insertion_penalty": (0.2, 0.65, 2.0),
}


def senone_scores(
    log_probs: np.ndarray, log_prior: np.ndarray, class_of_senone: np.ndarray, weights: Weights
) -> np.ndarray:
    """A net's log-probabilities as scaled log-likelihoods of the decoder's senones.

    acoustic_scale * (log p(class | frame) - prior_scale * log prior(class)). A senone without a class in
    the net gets, in every frame, one nat (before the scale) less than the worst class: it is worse than
    any other, but a path through it remains possible.

    Args:
        log_probs: float `[n, C]`, natural logarithms.
        log_prior: float `[C]`, of the classes' shares of the training frames.
        class_of_senone: int32 `[num_senones]`; -1 where the net has no such class.
        weights: only the first two are used.

    Returns:
        float32 `[n, num_senones]`.

    Raises:
        UserError: for shapes that do not match, classes outside -1..C-1, or values that are not finite.
    """
    _check(log_probs, log_prior, class_of_senone)
    prior = np.float32(weights.prior_scale) * np.asarray(log_prior, np.float32)
    likelihoods = np.asarray(log_probs, np.float32) - prior
    if np.isnan(likelihoods).any():
        raise UserError("log_probs has NaN: the net that computed them has diverged")
    floor = likelihoods.min(axis=1, keepdims=True) - np.float32(1)
    scores = np.float32(weights.acoustic_scale) * np.concatenate([likelihoods, floor], axis=1)
    return np.take(scores, class_of_senone, axis=1)  # -1 is the last column: the floor


def _check(log_probs: np.ndarray, log_prior: np.ndarray, class_of_senone: np.ndarray) -> None:
    classes, size = len(log_prior), sphinx.num_senones()
    if np.ndim(log_probs) != 2 or np.shape(log_probs)[1] != classes:
        raise UserError(f"log_probs has the shape {np.shape(log_probs)}, not [n, {classes}]")
    if np.shape(class_of_senone) != (size,):
        raise UserError(
            f"class_of_senone has the shape {np.shape(class_of_senone)}, not [{size}]: "
            "one class for each of the decoder's senones"
        )
    if np.min(class_of_senone) < -1 or np.max(class_of_senone) >= classes:
        raise UserError(
            f"class_of_senone must be within -1 and {classes - 1}, for {classes} classes"
        )
    if not np.isfinite(log_prior).all():
        raise UserError("log_prior isn't finite: a class without frames needs a count above 0")


def decode(
    score_sets: Sequence[np.ndarray],
    log_prior: np.ndarray,
    class_of_senone: np.ndarray,
    language_model: LanguageModel,
    weights: Weights,
    *,
    search: Search = FAST,
    threads: int | None = None,
    progress: str | None = "decoding",
) -> list[str]:
    """Decodes utterances from a net's log-probabilities.

    Args:
        score_sets: for each utterance log-probabilities `[n, C]`, 100 frames a second. May be a lazy
            sequence: each item is read once and dropped after use.
        log_prior: see `senone_scores`.
        class_of_senone: see `senone_scores`.
        language_model: only its words can be found.
        weights: of acoustic and language model.
        search: pruning.
        threads: decoders that run in parallel; None for one per processor.
        progress: name in progress lines; None for no lines.

    Returns:
        Hypotheses in the order of the utterances, words separated by spaces; "" for no frames.
    """

    def find(decoder: sphinx.Handle, index: int) -> str:
        scores = senone_scores(score_sets[index], log_prior, class_of_senone, weights)
        return sphinx.decode_costs(decoder, _costs(scores))

    options = _options(language_model, weights, search)
    return _decode_all(find, len(score_sets), options, threads, progress)


def decode_audio(
    audio: Sequence[np.ndarray],
    language_model: LanguageModel,
    *,
    search: Search = FAST,
    threads: int | None = None,
    progress: str | None = "decoding",
) -> list[str]:
    """Decodes utterances with the decoder's own acoustic model, otherwise like `decode`.

    Args:
        audio: int16 `[n]` at 16 kHz each.
        language_model: see `decode`.
        search: see `decode`.
        threads: see `decode`.
        progress: see `decode`.

    Returns:
        As `decode`.

    Raises:
        UserError: for samples that are not int16.
    """

    def find(decoder: sphinx.Handle, index: int) -> str:
        samples = np.asarray(audio[index])
        if samples.dtype != np.int16 or samples.ndim != 1:
            raise UserError(
                f"utterance {index}: audio must be int16 [n], "
                f"not {samples.dtype} of the shape {samples.shape}"
            )
        return sphinx.decode_samples(decoder, samples)

    options = _options(language_model, Weights(), search)
    return _decode_all(find, len(audio), options, threads, progress)


def _costs(scores: np.ndarray) -> np.ndarray:
    """Scores `[n, num_senones]` as the costs that `sphinx.decode_costs` takes, int16."""
    if not len(scores):
        return np.zeros(scores.shape, np.int16)
    below = scores.max(axis=1, keepdims=True) - scores
    below *= np.float32(1 / sphinx.NATS_PER_COST)
    return np.minimum(np.rint(below, out=below), sphinx.MAX_COST, out=below).astype(np.int16)


def _options(language_model: LanguageModel, weights: Weights, search: Search) -> dict[str, Any]:
    return {
        "lm": str(language_model.trigrams),
        "dict": str(language_model.dictionary),
        "lw": weights.language_weight,
        # Later passes use a larger language weight, in the ratios of the library's defaults.
        "fwdflatlw": weights.language_weight * 8.5 / 6.5,
        "bestpathlw": weights.language_weight * 9.5 / 6.5,
        "wip": weights.word_insertion_penalty,
        "beam": search.beam,
        "pbeam": search.phone_beam,
        "wbeam": search.word_beam,
        "maxhmmpf": search.max_states,
        "maxwpf": search.max_words,
        "fwdflat": search.second_pass,
        "bestpath": search.best_path,
    }


def _decode_all(
    find: Callable[[sphinx.Handle, int], str],
    size: int,
    options: Mapping[str, Any],
    threads: int | None,
    progress: str | None,
) -> list[str]:
    """Calls `find(decoder, index)` for every index below `size`, with one decoder per thread."""
    threads = max(1, min(threads or os.cpu_count() or 1, size))
    show = _print_progress(progress, size) if progress else lambda done: None
    free: queue.SimpleQueue[sphinx.Handle] = queue.SimpleQueue()

    def run(index: int) -> str:
        decoder = free.get()
        try:
            return find(decoder, index)
        finally:
            free.put(decoder)

    hypotheses = []
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(threads) as pool:
        for _ in range(threads):
            free.put(stack.enter_context(sphinx.open_decoder(options)))
        for hypothesis in pool.map(run, range(size)):
            hypotheses.append(hypothesis)
            show(len(hypotheses))
    return hypotheses


def _print_progress(name: str, size: int) -> Callable[[int], None]:
    """Prints a line with the remaining time every 10 s; on a terminal it is rewritten in place."""
    terminal = sys.stdout.isatty()
    started = time.monotonic()
    shown = [started]

    def show(done: int) -> None:
        now = time.monotonic()
        last = done == size
        if not last and now - shown[0] < (0.2 if terminal else 10):
            return
        shown[0] = now
        left = (now - started) / done * (size - done)
        text = f"{name}: {done}/{size} utterances, {now - started:.0f} s"
        text += f", {int(left // 60)}:{int(left % 60):02d} to go"
        if terminal:  # cut to one line, since only one line can be rewritten
            text = "\r\033[K" + text[: shutil.get_terminal_size().columns - 1]
        print(text, end="" if terminal and not last else "\n", flush=True)

    return show


def tune(
    score_sets: Sequence[np.ndarray],
    references: Sequence[str],
    log_prior: np.ndarray,
    class_of_senone: np.ndarray,
    language_model: LanguageModel,
    *,
    grid: Mapping[str, Sequence[float]] = GRID,
    start: Weights = START,
    search: Search = FAST,
    progress: str | None = "tuning",
) -> tuple[Weights, list[dict[str, float]]]:
    """Finds the weights with the lowest word error rate on validation utterances, one after another.

    Args:
        score_sets: of validation utterances; see `decode`.
        references: their words.
        log_prior: see `senone_scores`.
        class_of_senone: see `senone_scores`.
        language_model: see `decode`.
        grid: maps the name of a weight to the values to try. The weights are tuned in this order, each
            with the best values of the earlier ones.
        start: the weights before the search; they are kept if no others are better.
        search: see `decode`.
        progress: see `decode`; also a line for each point of the grid.

    Returns:
        The best weights, and for each point that was tried its weights and `word_errors.total`.

    Raises:
        UserError: if a name in the grid is not one of the weights.
    """
    if unknown := set(grid) - set(Weights._fields):
        raise UserError(f"grid: {sorted(unknown)} are not among the weights {Weights._fields}")
    tried: dict[Weights, dict[str, float]] = {}

    def rate(weights: Weights) -> float:
        if weights not in tried:
            hypotheses = decode(
                score_sets,
                log_prior,
                class_of_senone,
                language_model,
                weights,
                search=search,
                progress=progress,
            )
            tried[weights] = word_errors.total(word_errors.count(references, hypotheses))
            if progress:
                values = ", ".join(f"{name} {value:g}" for name, value in weights._asdict().items())
                print(
                    f"{progress}: {tried[weights]['word_error_rate']:.2f} % at {values}", flush=True
                )
        return tried[weights]["word_error_rate"]

    best = start
    rate(best)
    for name, values in grid.items():
        best = min([best, *(best._replace(**{name: value}) for value in values)], key=rate)
    return best, [{**weights._asdict(), **errors} for weights, errors in tried.items()]
