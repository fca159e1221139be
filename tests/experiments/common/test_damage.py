"""A damaged byte in any file of a finished run: it changes nothing, or a line names the file."""

import shutil

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from distill_jax import models, soft_targets, step_losses, trainer
from distill_jax.errors import UserError
from distill_jax.specialists import heads, store
from experiments.common.study import (
    Stage,
    finished_rows,
    run_stages,
    write_arrays,
    write_json,
)

CONFIG = ConfigDict({"preset": "smoke", "mesh": {"data": -1}, "net": {"epochs": 1}})
EXAMPLES = tiny.examples(16)
DIGESTS = soft_targets.digests(EXAMPLES["inputs"])


def make(context):
    """Everything that a run leaves: a training, a store of soft targets, specialists."""
    net = trainer.train(
        context.directory / "net",
        models.mlp([4], tiny.CLASSES),
        EXAMPLES,
        step_losses.label_loss,
        trainer.Recipe(epochs=context.config.net.epochs, batch_size=8),
        keys=jax.random.split(jax.random.key(0), 1),
        hyper={"learning_rate": 0.1},
    )
    logits = net.member(0).logits(EXAMPLES["inputs"])
    kept = {"encoding": "top_k", "k": 2, "temperatures": 2.0, "teacher": net.fingerprint}
    soft_targets.write(context.directory / "soft", logits, DIGESTS, **kept)
    sets = np.array([[0, 1]], np.int32)
    trained = store.Specialists(net, heads.LOG_SUM_EXP, sets, np.zeros(1, np.float32), tiny.CLASSES)
    store.save(context.directory / "specialists", trained)
    write_json(context.directory / "curves.json", {"epoch": [1, 2]})
    write_arrays(context.directory / "gallery.npz", x=np.arange(50))
    value = [float(logits.sum()), net.fingerprint]
    return [{"row": "net", "value": value, "targets": np.asarray(read(context.directory)).tolist()}]


STAGES = (Stage("made", make, (), ("net",)),)


def read(folder):
    kept = soft_targets.load(folder / "soft")
    specialists = store.load(folder / "specialists")
    found = soft_targets.rows(kept, np.arange(16), 2.0)["teacher_probabilities"].astype(np.float32)
    return found, np.broadcast_to(specialists.class_sets[:, :1], found.shape)


def use(workdir):
    """Reads all, as the next command would."""
    with jax.numpy_dtype_promotion("standard"):  # for optax's schedules
        run_stages(CONFIG, workdir, STAGES)
        rows = finished_rows(workdir, STAGES)
        read(workdir / "stages/made")
        context = ConfigDict({"directory": workdir / "stages/made", "config": CONFIG})
        assert make(context) == rows
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, use(workdir)


def flip(place):
    def damage(content):
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return damage


DAMAGES = [*map(flip, (0.0, 0.3, 0.6, 0.95)), lambda content: content[: len(content) // 2]]


def test_damage_to_any_file_is_harmless_or_named(finished, tmp_path):
    workdir, rows = finished
    paths = [path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()]
    tried = [p for p in paths if "checkpoints" not in p.parts and p.name != "lock"]
    assert len(tried) > 15
    named = set()
    for path in tried:
        for number, damage in enumerate(DAMAGES):
            copy = tmp_path / f"{path.name}_{number}"
            shutil.copytree(workdir, copy, dirs_exist_ok=True)
            (copy / path).write_bytes(damage((workdir / path).read_bytes()))
            try:
                assert use(copy) == rows, f"{path} {number}"
            except UserError as error:
                assert str(copy) in str(error) and "\n" not in str(error)
                named.add(path.name)
            shutil.rmtree(copy)
    assert {"net.json", "params.npz", "training.json", "stage.json", "config.json"} <= named
    assert {"curves.json", "gallery.npz"} <= named
    assert {"meta.json", "classes_T2.0.npy", "specialists.json", "class_sets.npy"} <= named
