"""The loss fused with the output layer: the dense one's values and gradients, without its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import fused_loss, losses, step_losses
from distill_jax.errors import UserError
from distill_jax.specialists import heads

# Examples, units, classes and rows of a chunk; few enough that compiling takes no time.
SIZES = st.sampled_from(
    [(13, 5, 2, 4), (6, 3, 7, 6), (9, 8, 300, 2), (5, 4, 20_000, 3), (8, 2, 33, 50)]
)
KINDS = ("labels", "logits", "top_k", "sampled", "arithmetic", "geometric")
temperatures = st.floats(0.5, 100, width=32)
few = settings(deadline=None, max_examples=40)
M, K = 3, 2
# LLVM's level, after XLA has split the work: programs that compile in half the time.
QUICK = {"xla_backend_optimization_level": 0}


def drawn(kind, size, units, classes, seed):
    """The arrays of a kind of soft targets, and a dict for what the float64 reference needs."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    hidden = 3 * normal(size, units)
    layer = {"kernel": normal(units, classes), "bias": normal(classes)}
    batch = {
        "label": random.integers(0, classes, size).astype(np.int32),
        "label_known": random.random(size) < 0.7,
    }
    if kind == "logits":
        batch["teacher_logits"] = 4 * normal(size, classes)
    if kind in ("top_k", "sampled"):
        batch["teacher_ids"] = np.argsort(random.random((size, classes)))[:, :K].astype(np.uint16)
        batch["teacher_probabilities"] = np.full((size, 1), 0.5, np.float32)
        batch["teacher_tail"] = np.zeros(size, np.float32)
    if kind == "top_k":
        parts = random.dirichlet(np.ones(K + 1), size)
        batch["teacher_probabilities"] = parts[:, :K].astype(jnp.bfloat16)
        batch["teacher_tail"] = parts[:, K].astype(np.float32)
    if kind in ("arithmetic", "geometric"):
        batch["teacher_hidden"] = normal(size, M, units)
        batch["teacher_layer"] = {"kernel": normal(M, units, classes), "bias": normal(M, classes)}
    return hidden, layer, batch


def softmax64(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def targets64(kind, batch, classes, temperature):
    """Soft targets `[B, C]` in float64, from their definitions."""
    size = len(batch["label"])
    if kind == "logits":
        return softmax64(np.float64(batch["teacher_logits"]) / temperature)
    if kind in ("top_k", "sampled"):
        p = np.zeros((size, classes))
        kept = np.broadcast_to(np.float64(batch["teacher_probabilities"]), (size, K))
        for n in range(size):
            others = np.setdiff1d(np.arange(classes), batch["teacher_ids"][n])
            if len(others):
                p[n, others] = np.float64(batch["teacher_tail"][n]) / len(others)
            p[n, batch["teacher_ids"][n]] = kept[n]
        return p
    layer = {name: np.float64(x) for name, x in batch["teacher_layer"].items()}
    logits = np.einsum("bmd,mdc->mbc", np.float64(batch["teacher_hidden"]), layer["kernel"])
    logits = (logits + layer["bias"][:, None]) / temperature
    return softmax64(logits).mean(0) if kind == "arithmetic" else softmax64(logits.mean(0))


def reference(kind, hidden, layer, batch, temperature, hard_weight, weights):
    """Losses and the gradients of their weighted sum, in float64; and how large a float32 error can be.

    An error is in proportion to the terms of a sum, not to what is left where they cancel: those of
    the labels' and the soft targets' gradients, and logits over T, of which exponentials are taken.
    """
    hidden, kernel, bias = (np.float64(x) for x in (hidden, layer["kernel"], layer["bias"]))
    z, rows = hidden @ kernel + bias, np.arange(len(hidden))
    known = batch["label_known"]
    if kind == "labels":
        hard_weight, p = 1.0, np.zeros_like(z)
    else:
        p = targets64(kind, batch, z.shape[1], temperature)
    q, q_1, one = softmax64(z / temperature), softmax64(z), np.zeros_like(z)
    one[rows, batch["label"]] = 1
    with np.errstate(divide="ignore"):
        soft = -(temperature**2) * np.where(p > 0, p * np.log(q), 0).sum(-1)
        hard = -np.log(q_1[rows, batch["label"]])
    values = (1 - hard_weight) * soft + np.where(known, hard_weight * hard, 0)
    of_soft = weights[:, None] * (1 - hard_weight) * temperature
    of_hard = weights[:, None] * hard_weight * known[:, None]
    q = q * p.sum(-1, keepdims=True)
    slope = of_soft * (q - p) + of_hard * (q_1 - one)
    terms = np.abs(of_soft) * (q + p) + np.abs(of_hard) * (q_1 + one)

    def gradients(hidden, kernel, slope):
        return slope @ kernel.T, {"kernel": hidden.T @ slope, "bias": slope.sum(0)}

    largest = np.abs(z).max()
    share = 1e-5 + 4 * np.finfo(np.float32).eps * largest / min(temperature, 1)
    errors = (
        share * (values + (temperature + 1) * largest / 4),
        jax.tree.map(lambda x: share * x, gradients(np.abs(hidden), np.abs(kernel), terms)),
    )
    return (values, gradients(hidden, kernel, slope)), errors


def loss_of(kind):
    if kind == "labels":
        return step_losses.label_loss
    if kind == "logits":
        return step_losses.distillation_loss
    if kind in ("top_k", "sampled"):
        return step_losses.top_k_distillation_loss()
    return step_losses.hidden_teacher_loss(kind)


def chunk_loss(kind):
    """With the teachers' layers as constants, as in the train step."""
    return lambda logits, fields, shared: loss_of(kind)(logits, fields, shared[1], shared[0])


def split(batch):
    whole = {name: field for name, field in batch.items() if name == "teacher_layer"}
    return {name: field for name, field in batch.items() if name not in whole}, whole


@functools.partial(jax.jit, static_argnums=(0, 1))
def fused_mean(kind, rows, hidden, layer, batch, hyper):
    fields, whole = split(batch)
    loss = chunk_loss(kind)
    return jax.value_and_grad(
        lambda hidden, layer: fused_loss.mean_loss(
            loss, hidden, layer, fields, (whole, hyper), rows=rows
        ),
        argnums=(0, 1),
        has_aux=True,
    )(hidden, layer)


@functools.partial(jax.jit, static_argnums=(0, 1))
def fused_examples(kind, rows, hidden, layer, batch, hyper, weights):
    fields, whole = split(batch)
    values, pull_back = jax.vjp(
        lambda hidden, layer: (
            fused_loss.per_example(
                chunk_loss(kind), hidden, layer, fields, (whole, hyper), rows=rows
            ).values
        ),
        hidden,
        layer,
    )
    return values, pull_back(weights)


def assert_within(found, expected, errors):
    jax.tree.map(
        lambda x, y, error: np.testing.assert_array_less(np.abs(x - y), error + 1e-30),
        found,
        expected,
        errors,
    )


@few
@given(
    SIZES, st.sampled_from(KINDS), temperatures, st.floats(0, 1, width=32), st.integers(0, 2**31)
)
def test_values_and_gradients_are_those_of_the_definition(sizes, kind, temperature, hard, seed):
    *shape, rows = sizes
    hidden, layer, batch = drawn(kind, *shape, seed)
    hyper = tiny.hyper(temperature=temperature, hard_weight=hard)
    (mean, outcome), gradients = fused_mean(kind, rows, hidden, layer, batch, hyper)
    weights = np.full(len(hidden), 1 / len(hidden))
    expected, errors = reference(kind, hidden, layer, batch, temperature, hard, weights)
    assert_within((outcome.values, gradients), expected, errors)
    np.testing.assert_allclose(mean, np.mean(outcome.values), rtol=1e-6)
    logits = np.float64(hidden) @ np.float64(layer["kernel"]) + np.float64(layer["bias"])
    chosen = np.take_along_axis(logits, np.asarray(outcome.predicted)[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(chosen, logits.max(-1), atol=1e-4)  # two may be nearly equal


@few
@given(SIZES, st.sampled_from(KINDS), temperatures, st.integers(0, 2**31))
def test_examples_can_be_weighted_afterwards(sizes, kind, temperature, seed):
    *shape, rows = sizes
    hidden, layer, batch = drawn(kind, *shape, seed)
    weights = np.random.default_rng(seed).standard_normal(len(hidden)).astype(np.float32)
    hyper = tiny.hyper(temperature=temperature)
    values, gradients = fused_examples(kind, rows, hidden, layer, batch, hyper, weights)
    hard = np.float64(hyper["hard_weight"])
    expected, errors = reference(kind, hidden, layer, batch, temperature, hard, np.float64(weights))
    assert_within((values, gradients), expected, errors)


def test_a_dustbin_class_and_classes_left_out():
    hidden, layer, batch = drawn("labels", 11, 6, 40, 0)
    layer["bias"][[3, 17]] = -np.inf
    batch["label"] = np.arange(11, dtype=np.int32) + 18
    constants = {"class_set": np.int32([20, 21, 25, 40])}  # the last one is padding

    def loss(logits, batch, constants):
        return heads.collapsed_loss(logits, batch, {}, constants)

    def dense(hidden, layer):
        logits = hidden @ layer["kernel"] + layer["bias"][None]
        return jnp.mean(loss(logits, batch, constants))

    def fused(hidden, layer):
        return fused_loss.mean_loss(loss, hidden, layer, batch, constants, rows=4)[0]

    found = jax.value_and_grad(fused, (0, 1))(hidden, layer)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    tiny.assert_close(found, jax.value_and_grad(dense, (0, 1))(hidden, layer))
    assert not found[1][1]["bias"][3] and found[1][1]["bias"][20]


def test_products_of_bfloat16_accumulate_in_float32():
    # In bfloat16 a sum of ones stops at 256.
    units = 4096
    hidden = jnp.ones((3, units), jnp.bfloat16)
    layer = {
        "kernel": jnp.stack([jnp.ones(units), jnp.zeros(units)], 1) / 1024,
        "bias": jnp.zeros(2),
    }
    batch = {"label": jnp.array([1, 1, 1], jnp.int32)}
    (mean, _), (back, gradients) = fused_mean("labels", 2, hidden, layer, batch, tiny.hyper())
    np.testing.assert_allclose(mean, 4 + np.log1p(np.exp(-4)), rtol=1e-6)
    assert back.dtype == jnp.bfloat16 and gradients["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(gradients["bias"], [0.982014, -0.982014], rtol=1e-5)
    np.testing.assert_allclose(gradients["kernel"][:, 0], 0.982014, rtol=2**-8)


def test_targets_and_temperature_are_constants():
    hidden, layer, batch = drawn("arithmetic", 4, 3, 5, 0)
    fields, whole = split(batch)

    def mean(fields, constants):
        return fused_loss.mean_loss(chunk_loss("arithmetic"), hidden, layer, fields, constants)[0]

    gradients = jax.grad(mean, (0, 1), allow_int=True)(fields, (whole, tiny.hyper()))
    floats = [leaf for leaf in jax.tree.leaves(gradients) if leaf.dtype != jax.dtypes.float0]
    assert len(floats) == 6 and not any(np.any(leaf) for leaf in floats)


def test_members_of_a_vmap_are_those_alone():
    hidden, layer, batch = drawn("top_k", 10, 4, 30, 0)
    temperature = jnp.array([1.0, 3.0, 20.0])
    hyper = {"temperature": temperature, "hard_weight": jnp.array([0.0, 0.5, 1.0])}
    layers = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), layer)
    run = functools.partial(fused_mean, "top_k", 4)
    found = jax.vmap(run, (None, 0, None, 0))(hidden, layers, batch, hyper)
    for m in range(3):
        own_layer, own_hyper = jax.tree.map(lambda x, m=m: x[m], (layers, hyper))
        alone = run(hidden, own_layer, batch, own_hyper)
        tiny.assert_close(jax.tree.map(lambda x, m=m: x[m], found), alone)


def of_labels(logits, fields, constants):
    return losses.hard_cross_entropy(logits, fields["label"])


def mean_and_gradients(loss, hidden, layer, fields, rows):
    """Of the fused loss, and of the dense one."""

    def fused(hidden, layer):
        return fused_loss.mean_loss(loss, hidden, layer, fields, None, rows=rows)[0]

    def dense(hidden, layer):
        logits = jnp.matmul(hidden, layer["kernel"])
        if "bias" in layer:
            logits += layer["bias"].reshape((1,) * (logits.ndim - 1) + (-1,))
        return jnp.mean(loss(logits, fields, None))

    return (jax.value_and_grad(run, (0, 1))(hidden, layer) for run in (fused, dense))


def test_rows_that_fill_up_the_last_chunk_have_no_part():
    hidden, layer, batch = drawn("labels", 7, 3, 5, 0)
    fields = {
        **batch,
        "frames": np.arange(1, 8, dtype=np.float32),
    }  # none is 0, as padding would be

    def mean_of_frames(logits, fields, constants):
        return of_labels(logits, fields, constants) / fields["frames"]

    found, expected = mean_and_gradients(mean_of_frames, hidden, layer, fields, rows=5)
    tiny.assert_close(found, expected)


@pytest.mark.parametrize("per_frame", [True, False])
def test_sequences_and_a_layer_without_bias(per_frame):
    hidden, layer, _ = drawn("labels", 15, 4, 6, 0)
    hidden, layer = hidden.reshape(5, 3, 4), {"kernel": layer["kernel"]}
    fields = {"label": np.arange(15, dtype=np.int32).reshape(5, 3) % 6}

    def loss(logits, fields, constants):
        values = of_labels(logits, fields, constants)
        return values if per_frame else jnp.sum(values, axis=-1)

    found, expected = mean_and_gradients(loss, hidden, layer, fields, rows=2)
    tiny.assert_close(found, expected)
    _, outcome = fused_loss.mean_loss(loss, hidden, layer, fields, None, rows=2)
    np.testing.assert_array_equal(
        outcome.predicted, jnp.argmax(jnp.matmul(hidden, layer["kernel"]), axis=-1)
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layer": {"bias": np.zeros(5)}}, "the output layer lacks kernel; there are bias"),
        ({"layer": {"kernel": np.zeros((4, 5))}}, r"kernel is .*\(4, 5\); expected float 3 C"),
        (
            {"layer": {"kernel": np.zeros((3, 5)), "scale": np.zeros(5)}},
            "has kernel, scale; expected",
        ),
        ({"fields": {"label": np.zeros(7, int), "rate": 0.5}}, "7 examples, but 'rate' is"),
        ({"fields": {"prior": np.zeros(5)}}, r"'prior' is \[5\]; expected \[7, ...\]"),
    ],
)
def test_what_does_not_fit_is_named(wrong, message):
    hidden, layer, fields = drawn("labels", 7, 3, 5, 0)
    given = {"hidden": hidden, "layer": layer, "fields": fields, **wrong}
    for run in (fused_loss.mean_loss, fused_loss.per_example):
        with pytest.raises(UserError, match=message):
            run(of_labels, **given, constants=None)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_chunk_are_all_that_is_in_memory(kind):
    arguments = (*drawn(kind, 1024, 16, 4000, 0), tiny.hyper())

    def dense(hidden, layer, batch, hyper):
        logits = hidden @ layer["kernel"] + layer["bias"][None]
        fields, whole = split(batch)
        values = loss_of(kind)(logits, fields, hyper, whole)
        return jnp.mean(values), (values, jnp.argmax(logits, -1))

    def temporary_bytes(run):
        compiled = run.lower(*arguments).compile(QUICK)
        return compiled.memory_analysis().temp_size_in_bytes

    fused = jax.jit(functools.partial(fused_mean, kind, None))
    whole_batch = jax.jit(jax.value_and_grad(dense, (0, 1), has_aux=True))
    assert temporary_bytes(fused) <= 0.15 * temporary_bytes(whole_batch)


@pytest.mark.parametrize(
    ("size", "units", "rows"),
    [
        (1, 64, 1),
        (127, 64, 127),
        (1024, 64, 128),
        (1100, 64, 138),  # eight chunks, with four examples to fill the last up
        (1024, 2560, 342),
        (8192, 2560, 512),
        (65_536, 2560, 2048),
    ],
)
def test_chunks_are_chosen_from_the_shapes(size, units, rows):
    assert fused_loss.chunk_rows(size, units) == rows
