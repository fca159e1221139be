"""The study's examples: windows of frames, and classes made of the aligner's states."""

import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from distill_jax import files
from distill_jax.data.images import Examples
from distill_jax.errors import UserError
from experiments.common import prepared
from experiments.speech import frames, speech_frames
from experiments.speech.speech_frames import SPLITS, Corpus, Utterance


class Data(NamedTuple):
    """Cases of `experiments.speech.frames`, and what belongs to them.

    lengths: int `[U]`, frames of the training utterances. train, validation, test: packed, "label" a
    class; train is empty where it is streamed (`training_set` serves both). num_classes: C.
    class_of_state: int32 `[num_senones]`. log_prior: float32 `[C]`, of the training frames. unheard:
    bool `[N]`, test frames of speakers who are not in training. fingerprint: of the training split's
    alignment and classes.
    """

    corpus: Corpus
    lengths: np.ndarray
    train: Examples
    validation: Examples
    test: Examples
    num_classes: int
    class_of_state: np.ndarray
    log_prior: np.ndarray
    unheard: np.ndarray
    fingerprint: str

    @property
    def byte(self) -> tuple[float, float]:
        """What the frames' bytes stand for, as `models.mlp` takes it."""
        zero, unit = self.corpus.metadata["byte"]
        return float(zero), float(unit)


def check_source(config: ConfigDict) -> str:
    """Names the content of the config's data; a UserError if they aren't there."""
    return files.content_of(prepared.find_set(speech_frames.KIND, config.data.source))


def load_data(config: ConfigDict) -> Data:
    """The config's data, read once per process."""
    data = config.data
    limits = tuple(data[f"{split}_frames"] for split in SPLITS)
    return _load(data.source, limits, data.min_frames, data.block_frames > 0)


@functools.cache
def _load(source: str, limits: tuple[int, ...], min_frames: int, streamed: bool) -> Data:
    whole = speech_frames.load(source, on_disk=("train",) if streamed else ())
    parts = {
        name: first_frames(whole.splits[name], limit, f"data.{name}_frames")
        for name, limit in zip(SPLITS, limits, strict=True)
    }
    corpus = Corpus(whole.name, parts, whole.metadata)
    phone_states = np.array(corpus.metadata["phone_states"], np.int32)
    counts = count_states(parts["train"], len(phone_states))
    class_of_state, num_classes = tie(counts, phone_states, min_frames)
    packed = {
        name: {} if streamed and name == "train" else pack(part, class_of_state)
        for name, part in parts.items()
    }
    shares = np.bincount(class_of_state, counts, minlength=num_classes)
    heard = {one.speaker for one in parts["train"]}
    unheard = np.array([one.speaker not in heard for one in parts["test"]])
    alignment = speech_frames.alignment_fingerprint(corpus, "train")
    classes = hashlib.sha256(class_of_state.tobytes()).hexdigest()[:8]
    return Data(
        corpus,
        np.array([len(one.states) for one in parts["train"]]),
        packed["train"],
        packed["validation"],
        packed["test"],
        num_classes,
        class_of_state,
        np.log((shares + 0.5) / (shares + 0.5).sum()).astype(np.float32),
        unheard[packed["test"]["utterance"]],
        f"{alignment}, {num_classes} classes {classes}",
    )


def first_frames(utterances: Sequence[Utterance], limit: int, key: str) -> Sequence[Utterance]:
    """The first utterances with at most `limit` frames in all; 0 stands for all."""
    if limit < 0:
        raise UserError(f"{key} is {limit}, expected 0 (all) or more")
    if not limit:
        return utterances
    ends = np.cumsum([len(one.states) for one in utterances])
    kept = utterances[: int(np.searchsorted(ends, limit, side="right"))]
    if not kept:
        raise UserError(f"{key} is {limit}, less than the first utterance's {ends[0]} frames")
    return kept


def count_states(utterances: Sequence[Utterance], num_states: int) -> np.ndarray:
    """Frames of each state `[num_states]`."""
    return np.bincount(np.concatenate([one.states for one in utterances]), minlength=num_states)


def tie(counts: np.ndarray, phone_states: np.ndarray, min_frames: int) -> tuple[np.ndarray, int]:
    """Classes of states: a state with too few training frames shares its phone's.

    Args:
        counts: training frames of each state `[S]`.
        phone_states: int `[S]`, the state of its phone that each is a variant of.
        min_frames: that a state needs for a class of its own; at least 1 in any case, because a state
            without training frames can't be learned.

    Returns:
        The class of each state int32 `[S]`, and the number of classes.
    """
    if len(counts) != len(phone_states):
        raise UserError(
            f"the set has states up to {len(counts) - 1}, its metadata names {len(phone_states)}"
        )
    own = counts >= max(min_frames, 1)
    tied = np.where(own, np.arange(len(counts)), len(counts) + phone_states)
    classes, class_of_state = np.unique(tied, return_inverse=True)
    return class_of_state.astype(np.int32), len(classes)


def pack(utterances: Sequence[Utterance], class_of_state: np.ndarray) -> Examples:
    """The utterances' frames as `experiments.speech.frames` has them, labelled with classes."""
    return frames.pack(
        [one.frames for one in utterances], [class_of_state[one.states] for one in utterances]
    )
