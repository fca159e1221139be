"""The whole way of specialists: trained from a generalist, saved, loaded, asked by Eq. 5."""

import jax
import numpy as np
import pytest

from distill_jax import models, step_losses, trainer
from distill_jax.specialists import enrichment, heads, inference, store

N, C, D = 1200, 6, 8
SETS = np.array([[0, 1, 2], [3, 4, C]], np.int32)


def make_examples(seed):
    """Classes in two clusters, whose own members are hard to tell apart."""
    means = np.random.default_rng(0).standard_normal((C, D)) + 6.0 * (np.arange(C) > 2)[:, None]
    random = np.random.default_rng(seed)
    label = np.append(np.arange(C), random.integers(0, C, N - C)).astype(np.int32)
    inputs = means[label] + 0.7 * random.standard_normal((N, D))
    return {"inputs": inputs.astype(np.float32), "label": label}


def keys(count):
    return jax.random.split(jax.random.key(0), count)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A generalist that is not trained to the end."""
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic promotes
        return trainer.train(
            tmp_path_factory.mktemp("generalist"),
            models.mlp([16], C),
            make_examples(1),
            step_losses.label_loss,
            trainer.Recipe(epochs=1, batch_size=32),
            keys=keys(1),
            hyper={"learning_rate": 5e-3},
        ).member(0)


@pytest.mark.parametrize("head", heads.HEADS.values(), ids=heads.HEADS)
def test_specialists_of_every_head_are_trained_saved_and_improve_predictions(head, base, tmp_path):
    enriched = enrichment.enrich(make_examples(1), SETS, C, head=head, generalist=base.params)
    with jax.numpy_dtype_promotion("standard"):
        net = trainer.train(
            tmp_path / "training",
            models.mlp([16], head.outputs(SETS.shape[1], C)),
            enriched.examples,
            head.loss,
            trainer.Recipe(
                epochs=3, batch_size=32, report_every=3, transforms=head.transforms(base.model)
            ),
            keys=keys(len(SETS)),
            hyper={"learning_rate": 5e-3, "temperature": 2.0},
            constants=enriched.constants,
            start=jax.vmap(lambda own: head.start(base.params, own, C))(SETS),
            reader=enrichment.READER,
        )
    trained = store.Specialists(net, head, SETS, enriched.corrections, C, base.fingerprint)
    store.save(tmp_path / "specialists", trained)
    found = store.load(tmp_path / "specialists", generalist=base.fingerprint, num_classes=C)

    test = make_examples(2)
    logits = base.logits(test["inputs"])
    q = inference.predict(found, logits, test["inputs"])
    np.testing.assert_array_equal(q, inference.predict(trained, logits, test["inputs"]))
    np.testing.assert_allclose(q.sum(axis=1), 1, atol=1e-5)
    before, after = (np.mean(one.argmax(axis=1) == test["label"]) for one in (logits, q))
    assert after > before + 0.02
