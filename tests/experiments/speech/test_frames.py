"""Windows of frames: cut as a plain loop cuts them, in epochs, digests, logits and error counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from distill_jax import (
    evaluator,
    models,
    optimizers,
    platforms,
    sharding,
    soft_targets,
    step_losses,
    train_step,
)
from distill_jax.epochs import make_epoch, take_rows
from distill_jax.errors import UserError
from experiments.speech import frames, nets

LENGTHS = [1, 2, 19, 26, 200, 1, 47]
N = sum(LENGTHS)
MODEL = models.mlp([], tiny.CLASSES)


def utterances(lengths=LENGTHS, seed=0):
    random = np.random.default_rng(seed)
    return (
        [random.integers(0, 256, (n, 40), np.uint8) for n in lengths],
        [random.integers(0, tiny.CLASSES, n).astype(np.int32) for n in lengths],
    )


def packed(lengths=LENGTHS):
    return frames.pack(*utterances(lengths))


def on_device(examples):
    return {name: jnp.asarray(field) for name, field in examples.items()}


def plain_windows(rows):
    """Every frame's window, by a loop; frames before the first and after the last are those."""
    return np.array(
        [
            [rows[min(max(t + offset, 0), len(rows) - 1)] for offset in range(-20, 6)]
            for t in range(len(rows))
        ]
    )


def all_windows(lengths=LENGTHS):
    return np.concatenate([plain_windows(rows) for rows in utterances(lengths)[0]])


def test_pack():
    inputs, states = utterances()
    examples = packed()
    shapes = {name: (field.shape, field.dtype) for name, field in examples.items()}
    case = ((N,), np.int32)
    assert shapes == {
        "frames": ((N + 25 * len(LENGTHS), 40), np.uint8),
        **dict.fromkeys(("id", "position", "label", "utterance"), case),
    }
    np.testing.assert_array_equal(examples["id"], np.arange(N))
    np.testing.assert_array_equal(examples["label"], np.concatenate(states))
    np.testing.assert_array_equal(examples["utterance"], np.repeat(np.arange(7), LENGTHS))
    np.testing.assert_array_equal(examples["frames"][examples["position"]], np.concatenate(inputs))


def test_further_fields_and_numbers():
    inputs, states = utterances()
    tails = [np.float32(i) + np.arange(n, dtype=np.float32) for i, n in enumerate(LENGTHS)]
    numbers = [10 * i for i in range(7)]
    examples = frames.pack(inputs, states, {"teacher_tail": tails}, numbers)
    np.testing.assert_array_equal(examples["teacher_tail"], np.concatenate(tails))
    np.testing.assert_array_equal(examples["utterance"], np.repeat(numbers, LENGTHS))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_windows_are_those_of_a_plain_loop(platform):
    assert (frames.LEFT, frames.RIGHT, frames.WINDOW) == (20, 5, 26)
    examples = on_device(packed())
    with platforms.compiling_for(platform):
        found = jax.jit(lambda *one: frames.cut(*one))(examples["frames"], examples["position"])
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, all_windows())


def test_the_label_is_the_21st_frame_s():
    inputs = [
        np.arange(s, s + n, dtype=np.uint8)[:, None].repeat(40, 1) for s, n in ((0, 60), (90, 9))
    ]
    states = [rows[:, 0].astype(np.int32) for rows in inputs]
    examples = on_device(frames.pack(inputs, states))
    rows = jnp.asarray(np.random.default_rng(0).permutation(69)[:32])
    batch = jax.jit(frames.gather_windows)(examples, rows)
    assert set(batch) == {"id", "inputs", "label"}
    np.testing.assert_array_equal(batch["inputs"][:, 20, 7], batch["label"])
    np.testing.assert_array_equal(batch["id"], rows)


def test_no_window_crosses_utterances():
    inputs = [np.full((n, 40), i + 1, np.uint8) for i, n in enumerate(LENGTHS)]
    examples = on_device(frames.pack(inputs, utterances()[1]))
    found = np.asarray(frames.cut(examples["frames"], examples["position"]))
    owner = np.asarray(examples["utterance"]) + 1
    np.testing.assert_array_equal(found, np.broadcast_to(owner[:, None, None], found.shape))


def test_select_shares_the_frames():
    examples = packed()
    for rows in (np.array([5, 3, 200]), examples["label"] == 1):
        part = frames.select(examples, rows)
        assert part["frames"] is examples["frames"]
        for name in ("id", "position", "label", "utterance"):
            np.testing.assert_array_equal(part[name], examples[name][rows])


def broken(change):
    inputs, states = utterances([4, 5, 6])
    change(inputs, states)
    return inputs, states


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: x.__setitem__(1, x[1].astype(np.int16)), r"1: frames are int16 \[5, 40\]"),
        (lambda x, y: x.__setitem__(2, x[2][:, 1:]), r"2: frames are uint8 \[6, 39\], expected"),
        (lambda x, y: x.__setitem__(0, x[0][:, 0]), r"0: frames are uint8 \[4\], expected uint8"),
        (lambda x, y: y.__setitem__(1, y[1].astype(np.int64)), r"1: states are int64 \[5\]"),
        (lambda x, y: y.__setitem__(1, y[1][:-1]), "utterance 1: 5 frames, but 4 of states"),
        (lambda x, y: x.__setitem__(1, x[1][:0]), "utterance 1 has no frames"),
        (lambda x, y: y.pop(), "3 utterances have frames, but 2 have states"),
        (lambda x, y: (x.clear(), y.clear()), "no utterances to pack"),
    ],
)
def test_what_can_not_be_packed(change, message):
    with pytest.raises(UserError, match=message):
        frames.pack(*broken(change))


def test_fields_of_other_lengths():
    inputs, states = utterances([4, 5])
    with pytest.raises(UserError, match="utterance 1: 5 frames, but 4 of teacher_tail"):
        frames.pack(inputs, states, {"teacher_tail": [np.zeros(4), np.zeros(4)]})
    with pytest.raises(UserError, match="2 utterances have frames, but 1 have teacher_tail"):
        frames.pack(inputs, states, {"teacher_tail": [np.zeros(4)]})


def id_step(state, batch, key, hyper, constants):
    """Trains nothing; its metrics are what it was handed."""
    return state._replace(step=state.step + 1), {"id": batch["id"], "inputs": batch["inputs"]}


def run_epoch(lengths, batch_size, key, first_step=0):
    state = train_step.TrainState(jnp.int32(first_step), {}, ())
    epoch = jax.jit(make_epoch(id_step, batch_size, gather=frames.gather_windows))
    _, seen = epoch(state, on_device(packed(lengths)), key, {})
    return np.asarray(seen["id"]), np.asarray(seen["inputs"]).reshape(-1, 26, 40)


def test_an_epoch_sees_every_frame_once_in_another_order(key):
    steps = N // 8
    assert N % 8 == 0
    first, windows = run_epoch(LENGTHS, 8, key)
    second, _ = run_epoch(LENGTHS, 8, key, first_step=steps)
    np.testing.assert_array_equal(np.sort(first), np.arange(N))
    np.testing.assert_array_equal(np.sort(second), np.arange(N))
    assert list(first) != list(second)
    np.testing.assert_array_equal(windows, all_windows()[first])


def test_batches_mix_utterances(key):
    ids, _ = run_epoch([30] * 50, 64, key)
    for batch in (ids // 30).reshape(-1, 64):
        assert len(set(batch)) > 20  # 36 expected


def test_take_rows_takes_every_field(key):
    fields = on_device(tiny.examples(9))
    rows = jnp.array([4, 0, 8])
    tiny.assert_equal(take_rows(fields, rows), {name: fields[name][rows] for name in fields})


def test_frames_are_shared_by_the_members_of_an_epoch():
    mesh = sharding.make_mesh(2, 4)
    optimizer = optimizers.sgd(lambda step: jnp.float32(1), max_norm=0.0)
    step = train_step.make_train_step(MODEL, optimizer, step_losses.label_loss)
    run = make_epoch(
        step, 56, shard_batch=sharding.shard_batch(mesh, 56), gather=frames.gather_windows
    )
    examples = packed()
    per_member = {name: False for name in examples}
    compiled = sharding.compile_epoch(run, mesh, per_member)
    keys = jax.random.split(jax.random.key(1), 2)
    window = jnp.zeros((1, 26, 40), jnp.uint8)

    def init(key):
        return train_step.init_state(MODEL, optimizer, key, window)

    states, metrics = compiled(
        sharding.init_members(init, keys, mesh),
        sharding.put_examples(examples, mesh, per_member),
        keys,
        {"learning_rate": jnp.full(2, 0.1)},
        {},
    )
    assert metrics["loss"].shape == (2, N // 56) and np.isfinite(metrics["loss"]).all()
    alone, _ = jax.jit(make_epoch(step, 56, gather=frames.gather_windows))(
        init(keys[1]), on_device(examples), keys[1], {"learning_rate": jnp.float32(0.1)}
    )
    found = jax.tree.map(lambda leaf: leaf[1], jax.device_get(states.params))
    tiny.assert_close(found, jax.device_get(alone.params), rtol=1e-4, atol=1e-5)


def test_digests_are_those_of_the_windows():
    expected = soft_targets.digests(all_windows())
    for chunk in (1, 50, N, 10_000):
        np.testing.assert_array_equal(frames.digests(packed(), chunk), expected)
    rows = np.array([250, 0, 17])
    np.testing.assert_array_equal(frames.digests(frames.select(packed(), rows)), expected[rows])


def test_a_digest_depends_on_each_of_its_frames_and_no_other():
    inputs, states = utterances([90])
    before = frames.digests(frames.pack(inputs, states))
    for t in range(30, 60):
        changed = inputs[0].copy()
        changed[t, t % 40] ^= 1
        differs = before != frames.digests(frames.pack([changed], states))
        np.testing.assert_array_equal(np.flatnonzero(differs), np.arange(t - 5, t + 21))


def member_params(count):
    keys = jax.random.split(jax.random.key(2), count)
    return jax.vmap(lambda key: MODEL.init(key, jnp.zeros((1, 26, 40), jnp.uint8)))(keys)


def plain_logits(params):
    kernel, bias = (np.asarray(params["output"][name], np.float64) for name in ("kernel", "bias"))
    return all_windows().reshape(N, -1) / 255 @ kernel + bias


@pytest.mark.parametrize(("batch_size", "place"), [(64, dict), (74, on_device), (1000, dict)])
def test_logits_over_windows(batch_size, place):
    params = jax.tree.map(lambda leaf: leaf[0], member_params(1))
    rows = np.random.default_rng(0).permutation(N)[:148]  # 2 batches of 74, or 3 that aren't full
    found = frames.logits_over_windows(MODEL.apply, params, place(packed()), rows, batch_size)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_allclose(found, plain_logits(params)[rows], rtol=1e-4, atol=1e-4)


def test_logits_over_no_windows():
    params = jax.tree.map(lambda leaf: leaf[0], member_params(1))
    none = np.zeros(0, np.int64)
    found = frames.logits_over_windows(MODEL.apply, params, packed(), none, 8)
    assert found.shape == (0, tiny.CLASSES)


def test_all_calls_share_one_program():
    traces = []

    def apply(params, windows):
        traces.append(windows.shape)
        return windows[:, 0].astype(jnp.float32)

    for count in (3, 32, 40):
        frames.logits_over_windows(apply, {}, packed(), np.arange(count), 32)
    assert set(traces) == {(32, 26, 40)} and len(traces) <= 4  # one more a call, for the classes


@pytest.mark.parametrize("batch_size", [50, N, 1000])
def test_counted_errors_are_numpy_s(batch_size):
    examples = packed()
    examples["label"] = np.where(examples["id"] % 9, examples["label"], -1)
    members = member_params(3)
    count = evaluator.compile_errors(MODEL, nets.WINDOWS, batch_size)
    counted = count(members, {}, on_device(examples))
    for member in range(3):
        params = jax.tree.map(lambda leaf, member=member: leaf[member], members)
        wrong = plain_logits(params).argmax(-1) != examples["label"]
        wrong &= examples["label"] >= 0
        assert 0 < wrong.sum() < N
        assert counted[member] == wrong.sum()
    alone = count(jax.tree.map(lambda leaf: leaf[None], params), {}, on_device(examples))
    known = np.count_nonzero(examples["label"] >= 0)
    assert alone.tolist() == [wrong.sum()]
    assert nets.known_frames(examples) == known
