"""Members that start from given nets, and errors counted on examples of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from distill_jax import models, step_losses, trainer
from distill_jax.epochs import take_rows
from experiments.common import training
from experiments.common.config import net_section
from experiments.specialists.training import count_errors, take_counted

N, C, D = 60, 7, 5
SET = np.array([1, 4, 6], np.int32)
PADDED = np.array([2, 5, C], np.int32)
GENERALIST = models.mlp([8], C)


def generalist_params(seed=0):
    """Weights and biases, large enough for its predictions to be far from uniform."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(GENERALIST.init, jax.random.key(0), jnp.zeros((1, D)))
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), jnp.float32), shapes
    )


def plain_examples(seed=1):
    random = np.random.default_rng(seed)
    return {
        "inputs": random.standard_normal((N, D)).astype(np.float32),
        "label": np.append(np.arange(C), random.integers(0, C, N - C)).astype(np.int32),
    }


M, OWN_SETS = 2, (SET, PADDED)


def net(**changes):
    recipe = {"batch_size": 8, "epochs": 2, "save_every": 1, "warmup_epochs": 0}
    return ConfigDict(net_section(**{**recipe, **changes}))


def train(directory, examples, start, evaluation=None, reader=trainer.PLAIN, **changes):
    mesh = {"member": 2, "data": 4, "model": 1}
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic promotes
        return training.train(
            ConfigDict({"seeds": (0, 1), "selection": "last", "mesh": mesh, "data": {}}),
            net(**changes),
            GENERALIST,
            examples,
            step_losses.label_loss,
            keys=jax.random.split(jax.random.key(0), 2),
            directory=directory,
            name="test",
            evaluation=evaluation or {},
            reader=reader,
            start=start,
        )


def two_starts():
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(generalist_params, range(M)))


def test_members_start_from_the_parameters_given(tmp_path):
    start = two_starts()
    kept = jax.device_get(start)
    trained = train(tmp_path / "still", [plain_examples()] * M, start, learning_rate=1e-30)
    tiny.assert_equal(jax.device_get(trained.params), kept)
    assert np.ravel(trained.history[-1]["step"])[0] == 2 * (N // 8)  # it did train
    moved = train(tmp_path / "moved", [plain_examples()] * M, start, learning_rate=1e-3)
    for found, before in zip(jax.tree.leaves(moved.params), jax.tree.leaves(kept), strict=True):
        distance = np.abs(np.asarray(found) - before)
        # Numbers of deviation 1 that other starts don't share.
        assert (distance.reshape(M, -1).max(axis=1) > 0).all() and distance.max() < 0.1
    tiny.assert_equal(jax.device_get(start), kept)  # training leaves them to their owner


def test_own_evaluation_examples_are_counted_as_one_by_one(tmp_path):
    """Other images for each member, and fields that both share."""
    start, shared = two_starts(), np.arange(N, dtype=np.int32) % C
    own = [{"inputs": plain_examples(10 + m)["inputs"], "label": shared} for m in range(M)]
    trained = train(
        tmp_path,
        [plain_examples()] * M,
        start,
        {"own_errors": own, "shared_errors": own[1]},
    )
    for m in range(M):
        for name, one in (("own_errors", own[m]), ("shared_errors", own[1])):
            wrong = trained.member(m).logits(one["inputs"]).argmax(axis=1) != one["label"]
            assert trained.history[-1][name][m] == wrong.sum() > 0


@pytest.mark.parametrize("special", [True, False])
def test_restricted_errors_of_each_members_own_classes(tmp_path, special):
    """As while specialists learn: shared images, and each its own classes to choose among."""
    examples = plain_examples()
    own = []
    for class_set in OWN_SETS:
        allowed = np.isin(np.arange(C), class_set) == special
        counted = allowed[examples["label"]]
        wanted = {"allowed": allowed, "wanted": examples["label"], "counted": counted}
        own.append({"inputs": examples["inputs"], **wanted})
    reader = trainer.Reader(take_rows, count_errors, gather_evaluated=take_counted)
    trained = train(tmp_path, [examples] * M, two_starts(), {"test_errors": own}, reader)
    for m, one in enumerate(own):
        logits = np.where(one["allowed"], trained.member(m).logits(one["inputs"]), -np.inf)
        wrong = logits.argmax(axis=1) != one["wanted"]
        expected = wrong[one["counted"]].sum()
        assert trained.history[-1]["test_errors"][m] == expected
        alone = count_errors(
            GENERALIST, jax.tree.map(lambda leaf, m=m: leaf[m], trained.params), one
        )
        assert alone == expected > 0
