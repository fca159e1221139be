"""Accuracy on the embedded test utterances, of nets that learned from the whole corpus they are part of.

So the student that is published can be measured without that corpus.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from distill_jax import files
from distill_jax.data.images import Examples
from distill_jax.nets import Net
from experiments.common.published import PRESET, Published
from experiments.common.study import Context, Row, make_row
from experiments.speech import frames, nets, speech_frames
from experiments.speech.config import get_config
from experiments.speech.data import Data, load_data, pack

CLASSES = "classes.json"
_METRIC = "frame_accuracy_embedded_utterances"


def rows(context: Context, row: str, net: Net, seconds: float) -> list[Row]:
    """Accuracy on the embedded test utterances, where they are a part of the test set.

    Writes `CLASSES` into the stage's folder: the class of each state.
    """
    data = load_data(context.config)
    files.write_json(context.directory / CLASSES, data.class_of_state.tolist())
    chosen = _is_embedded(data)
    if not chosen.any() or chosen.all():
        return []
    found = nets.accuracies(net, frames.select(data.test, np.flatnonzero(chosen)))
    return [make_row(context.config, "speech", row, _METRIC, found, seconds=seconds)]


def _is_embedded(data: Data) -> np.ndarray:
    """Which test frames are of embedded test utterances, bool `[N]`."""
    embedded = {one.id for one in speech_frames.load("embedded").splits["test"]}
    own = [one.id in embedded for one in data.corpus.splits["test"]]
    return np.array(own)[data.test["utterance"]]


def test_accuracy(net: Net, classes: Sequence[int]) -> float:
    """Frame accuracy of one net on the embedded test utterances, per cent.

    Args:
        net: of this study.
        classes: the class of each state.
    """
    utterances = speech_frames.load("embedded").splits["test"]
    test: Examples = pack(utterances, np.asarray(classes, np.int32))
    one = net._replace(params=jax.tree.map(lambda leaf: np.asarray(leaf)[None], net.params))
    return float(nets.accuracies(one, test)[0])


def _measure(net: Net) -> float:
    classes = Path(__file__).with_name("published") / "distilled" / CLASSES
    return test_accuracy(net, files.read_json(classes))


PUBLISHED = {
    "distilled": Published(
        "distilled/distilled",
        ("speech", f"distilled, T={get_config(PRESET).distilled.temperature:g}", _METRIC),
        _measure,
        within=0.01,  # a frame or two whose two best states another machine's rounding may swap
        beside=(f"distilled/{CLASSES}",),
    )
}
