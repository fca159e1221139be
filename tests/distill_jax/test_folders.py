"""Folders that a user names: one that can't be written to, or isn't there, is said in one line."""

import jax
import numpy as np
import pytest
import tiny

from distill_jax import checkpoints, models, nets, soft_targets, step_losses, trainer
from distill_jax.errors import UserError
from distill_jax.specialists import heads, store

MODEL = models.mlp([4], tiny.CLASSES)
KEYS = jax.random.split(jax.random.key(0), 1)
PARAMS = jax.vmap(lambda key: MODEL.init(key, np.zeros((1, 2), np.float32)))(KEYS)
NET = nets.Net(MODEL, PARAMS, [], 0.0, 1, {})
SETS = np.array([[0, 1]], np.int32)
SPECIALISTS = store.Specialists(NET, heads.LOG_SUM_EXP, SETS, np.zeros(1, np.float32), tiny.CLASSES)


def train(folder):
    recipe, hyper = trainer.Recipe(epochs=1, batch_size=8), {"learning_rate": 0.1}
    loss, examples = step_losses.label_loss, tiny.examples(8)
    return trainer.train(folder, MODEL, examples, loss, recipe, keys=KEYS, hyper=hyper)


WRITERS = {
    "soft targets": lambda folder: soft_targets.write(
        folder, np.zeros((4, 3)), np.arange(4, dtype=np.uint64), teacher="t"
    ),
    "a net": lambda folder: nets.save(folder, NET),
    "specialists": lambda folder: store.save(folder, SPECIALISTS),
    "checkpoints": checkpoints.open_dir,
    "a training": train,
}
READERS = {"nets": nets.load, "soft targets": soft_targets.load, "specialists": store.load}


@pytest.mark.parametrize("call", WRITERS.values(), ids=WRITERS)
def test_a_folder_that_can_not_be_written(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in ("file", "file/net"):
        with pytest.raises(UserError, match=r"file is (no folder|a file)"):
            call(tmp_path / folder)
    with pytest.raises(UserError, match="/proc can't be written to"):
        call("/proc/folder")
    with pytest.raises(UserError, match="gs://bucket/net is not on a local file system"):
        call("gs://bucket/net")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("call", READERS.values(), ids=READERS)
def test_a_folder_that_is_not_there(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in ("none", "file"):
        with pytest.raises(UserError, match=str(tmp_path / folder)):
            call(tmp_path / folder)
