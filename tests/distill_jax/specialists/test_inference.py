"""Which specialists are active, that only those are run, mistakes, and the benchmark."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command import benchmark

from distill_jax.errors import UserError
from distill_jax.models import Model
from distill_jax.nets import Net
from distill_jax.specialists import eq5, heads, inference
from distill_jax.specialists.store import Specialists
from experiments.benchmarks import specialist_inference


def ensemble(seed, num_specialists=6, classes=10, special=3):
    """Logits of a generalist for 50 inputs, class sets, linear specialists, and the inputs."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((50, 4)).astype(np.float32)
    generalist = random.standard_normal((50, classes)).astype(np.float32)
    everything = np.tile(np.arange(classes, dtype=np.int32), (num_specialists, 1))
    sets = random.permuted(everything, axis=1)[:, :special]
    shape = (num_specialists, 4, special + 1)
    return generalist, sets, random.standard_normal(shape).astype(np.float32), inputs


def linear(weights, sets, apply=lambda weights, x: x @ weights, head=heads.UNIT):
    """Specialists of linear networks `[K, D, outputs]`, without corrections."""
    model = Model(lambda key, x: weights[0], apply)
    net = Net(model, weights, history=[], seconds=0.0, members=len(weights), about={})
    return Specialists(net, head, sets, np.zeros(len(sets), np.float32), num_classes=10)


def gather_active(generalist, logits, sets, ids, active):
    """Evidence from the logits of all specialists `[K, B, S + 1]`, where all were run."""
    chosen = logits[ids, jnp.arange(len(ids))[:, None]]
    return inference.Evidence(generalist, chosen, sets[ids], active)


def all_run(generalist, sets, weights, inputs):
    """The evidence of an ensemble, with every specialist run on every input."""
    logits = jnp.einsum("nd,kds->kns", inputs, weights)
    ids, active, count = inference.active_specialists(jnp.asarray(generalist), sets, len(sets))
    width = int(count.max())
    ids, active = ids[:, :width], active[:, :width]
    return gather_active(jnp.asarray(generalist), logits, jnp.asarray(sets), ids, active)


@pytest.mark.parametrize("n", [1, 3])
def test_specialists_of_the_most_probable_classes_are_active(n):
    generalist, sets, _, _ = ensemble(0)
    sets[2, 1:] = 10  # a smaller set, padded
    choose = jax.jit(inference.active_specialists, static_argnums=(2, 3))
    ids, active, count = (np.asarray(x) for x in choose(generalist, sets, 6, n))
    p, top = np.asarray(jax.nn.softmax(generalist)), np.argsort(-generalist, -1)[:, :n]
    for i in range(50):
        expected = {k for k in range(6) if set(sets[k]) & set(top[i])}
        assert set(ids[i][active[i]]) == expected and count[i] == len(expected)
        relevance = [p[i, sets[k][sets[k] < 10]].sum() for k in ids[i][active[i]]]
        assert (np.diff(relevance) < 1e-6).all()
    fewer = choose(generalist, sets, 2, n)
    np.testing.assert_array_equal(fewer[0][active[:, :2]], ids[:, :2][active[:, :2]])
    np.testing.assert_array_equal(fewer[2], count)  # tells what was left out
    assert count.max() > 2


def test_only_active_specialists_are_run():
    generalist, sets, weights, inputs = ensemble(1)
    seen = []

    def apply(weights, x):
        jax.debug.callback(lambda w, x: seen.append((w.copy(), x.copy())), weights, x)
        return x @ weights

    evidence = inference.run_active(linear(weights, sets, apply), generalist, inputs, batch_size=8)
    jax.effects_barrier()
    ids, active, count = inference.active_specialists(jnp.asarray(generalist), sets, 6)
    width = int(count.max())
    assert evidence.active.shape == (50, width)
    for k in range(6):
        used = np.asarray((active & (ids == k)).any(-1))
        rows = [x for w, x in seen if (w == weights[k]).all()]
        assert len(rows) == -(-used.sum() // 8)  # batches of 8, no more than it takes
        found = np.unique(np.concatenate(rows), axis=0) if rows else np.zeros((0, 4))
        np.testing.assert_array_equal(found, np.unique(inputs[used], axis=0))

    gathered = all_run(generalist, sets, weights, inputs)
    run, gathered = (jax.tree.map(np.asarray, x) for x in (evidence, gathered))
    np.testing.assert_array_equal(run.active, gathered.active)
    for name in ("specialists", "class_sets"):
        found, expected = (getattr(x, name)[run.active] for x in (run, gathered))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    found, expected = (inference.combine(x)[0] for x in (run, gathered))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_one_program_serves_all_specialists_and_rows():
    generalist, sets, weights, inputs = ensemble(2)
    traces = []

    def apply(weights, x):
        traces.append(x.shape)
        return x @ weights

    inference.run_active(linear(weights, sets, apply), generalist, inputs, batch_size=16, n=2)
    inference.predict(linear(weights, sets, apply), generalist, inputs, batch_size=16)
    assert traces == [(16, 4)]


@pytest.mark.parametrize("head", heads.HEADS.values(), ids=heads.HEADS)
def test_predictions_are_of_corrected_heads_in_parts_as_at_once(head, monkeypatch):
    generalist, sets, _, inputs = ensemble(5)
    random = np.random.default_rng(5)
    weights = random.standard_normal((6, 4, head.outputs(3, 10))).astype(np.float32)
    corrections = random.standard_normal(6).astype(np.float32)
    specialists = linear(weights, sets, head=head)._replace(corrections=corrections)
    found = inference.predict(specialists, generalist, inputs, n=2)
    monkeypatch.setattr(inference, "ROWS", 17)
    parts = inference.predict(specialists, generalist, inputs, n=2)
    np.testing.assert_allclose(parts, found, atol=1e-6)
    ids, active, _ = inference.active_specialists(jnp.asarray(generalist), sets, 6, n=2)
    logits = jnp.einsum("nd,kds->kns", inputs, weights)
    read = jax.vmap(head.read)(logits, sets, corrections)
    named = sets if head.has_dustbin else np.tile(np.arange(10, dtype=np.int32), (6, 1))
    evidence = gather_active(generalist, read, jnp.asarray(named), ids, active)
    np.testing.assert_allclose(found, inference.combine(evidence)[0], atol=2e-6)


def test_full_softmax_specialists_and_the_generalist_make_their_arithmetic_mean():
    generalist, sets, _, inputs = ensemble(4)
    sets[2, 1:] = 10
    weights = np.random.default_rng(4).standard_normal((6, 4, 10)).astype(np.float32)

    full = linear(weights, sets, head=heads.FULL_HARD)
    evidence = inference.run_active(full, generalist, inputs, batch_size=16, n=2)
    assert evidence.specialists.shape == (*evidence.active.shape, 11)
    np.testing.assert_array_equal(evidence.class_sets[evidence.active][:, 9], 9)
    q, _ = inference.combine(evidence)
    top = np.argsort(-generalist, -1)[:, :2]
    counts = []
    for i in range(50):
        active = [k for k in range(6) if set(sets[k]) & set(top[i])]  # by the special sets
        models = [generalist[i], *(inputs[i] @ weights[k] for k in active)]
        counts.append(len(active))
        np.testing.assert_allclose(q[i], jax.nn.softmax(np.array(models)).mean(0), atol=2e-6)
    assert min(counts) < 2 < max(counts)


def test_mistakes_are_named():
    generalist, sets, weights, inputs = ensemble(3)
    evidence = all_run(generalist, sets, weights, inputs)
    with pytest.raises(UserError, match=r"specialists is float32 \(50, \d, 3\); expected"):
        inference.combine(evidence._replace(specialists=evidence.specialists[..., :3]))
    with pytest.raises(UserError, match=r"active is bool \(50, 2\); expected bool B A"):
        inference.combine(evidence._replace(active=evidence.active[:, :2]))
    with pytest.raises(UserError, match="'forward' or 'reverse', not 'backward'"):
        eq5.newton("backward")
    with pytest.raises(UserError, match="'forward' or 'reverse', not 'backward'"):
        eq5.descent(optax.sgd(2.0), "backward")
    with pytest.raises(UserError, match="max_active is 7, but there are 6"):
        inference.active_specialists(jnp.asarray(generalist), sets, 7)

    def run(weights=weights, sets=sets, inputs=inputs, **options):
        inference.predict(linear(weights, sets), generalist, inputs, **options)

    with pytest.raises(UserError, match="class 11; there are 10"):
        run(sets=np.where(sets == 0, 11, sets))
    with pytest.raises(UserError, match=r"leading axes \[5\] for 6 class sets"):
        run(weights=weights[:5])
    with pytest.raises(
        UserError, match=r"'unit' gave logits \(256, 4\) for .*; expected \(256, 3\)"
    ):
        run(sets=sets[:, :2])
    with pytest.raises(UserError, match="49 inputs for 50 rows"):
        run(inputs=inputs[:49])
    with pytest.raises(UserError, match="n is 11; expected 1 to 10 classes"):
        run(n=11)


def test_the_benchmark_ends_with_its_result():
    flags = ["--sizes=40x6x8", "--examples=4", "--max_passes=30"]
    result = benchmark("specialist_inference", *flags)
    assert result["benchmark"] == "specialist_inference"
    assert result["device"] in ("cpu", "gpu")
    figures = result["figures"]
    assert set(figures) == {
        f"40x6x8 {name}" for name in ("newton", "fixed_point", "adam", "gradient_descent")
    }
    assert figures["40x6x8 newton"]["unfinished"] == 0
    assert figures["40x6x8 newton"]["top1_agreement"] == 1
    assert figures["40x6x8 gradient_descent"]["unfinished"] == 1
    assert figures["40x6x8 gradient_descent"]["passes_median"] == 30
    assert result["ratios"]["40x6x8 passes_p99 gradient_descent/newton"] > 1
    assert all(0 < ratio < np.inf for ratio in result["ratios"].values())


def test_the_benchmark_reads_predictions_of_its_own(tmp_path):
    evidence = all_run(*ensemble(0))
    np.savez(tmp_path / "real.npz", **evidence._asdict())
    read = specialist_inference.read(tmp_path / "real.npz", 2)
    for found, expected in zip(read, evidence, strict=True):
        np.testing.assert_array_equal(found, expected[:2])
    np.savez(tmp_path / "other.npz", generalist=evidence.generalist)
    with pytest.raises(UserError, match=r"other.npz is not an .npz of generalist, specialists"):
        specialist_inference.read(tmp_path / "other.npz", 2)
