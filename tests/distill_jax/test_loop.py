"""The loop: resumption, bad losses, records."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from distill_jax import checkpoints, loop, metrics, models, optimizers, step_losses, train_step
from distill_jax.epochs import make_epoch
from distill_jax.errors import UserError

OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0))
MODEL = models.mlp([6], tiny.CLASSES, hidden_dropout=0.5)
STEPS = 3  # per unit: 24 examples in batches of 8


EPOCH = make_epoch(train_step.make_train_step(MODEL, OPTIMIZER, step_losses.label_loss), 8)
ADVANCE = jax.jit(EPOCH, donate_argnums=0)
ADVANCE_MEMBERS = jax.jit(jax.vmap(EPOCH, in_axes=(0, None, 0, None)), donate_argnums=0)


def make_examples(bad=None):
    fields = tiny.examples(24)
    fields["inputs"] = fields["inputs"] / np.float32(255)
    if bad is not None:
        fields["inputs"][bad, 0, 0] = np.nan
    return {name: jnp.asarray(field) for name, field in fields.items()}


@jax.jit
def fresh(key):
    return train_step.init_state(MODEL, OPTIMIZER, key, jnp.zeros((1, 4, 4)))


@jax.jit
def evaluate(state):
    examples = make_examples()
    logits = MODEL.apply(state.params, examples["inputs"])
    return {"test_errors": metrics.error_counts(logits, examples["label"])["errors"]}


def advance(state, unit):
    return ADVANCE(state, make_examples(), jax.random.key(1), tiny.hyper())


def fit(units, directory=None, advance=advance, **kwargs):
    state = fresh(jax.random.key(0))
    if directory is None:
        return loop.fit(advance, state, units, evaluate=evaluate, **kwargs)
    with checkpoints.open_dir(directory, kwargs.get("best_metric")) as manager:
        return loop.fit(advance, state, units, evaluate=evaluate, manager=manager, **kwargs)


def timeless(history):
    return [{name: v for name, v in record.items() if name != "seconds"} for record in history]


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir())


def test_records_hold_every_unit():
    state, history = fit(4)
    expected = fresh(jax.random.key(0))
    for unit, record in enumerate(history):
        expected, sums = advance(expected, unit)
        assert record["unit"] == unit + 1 and record["step"] == STEPS * (unit + 1)
        np.testing.assert_allclose(record["train_loss"], np.sum(sums["loss"]) / 24, rtol=1e-6)
        np.testing.assert_allclose(record["train_errors"], np.sum(sums["errors"]) / 24)
        assert record["test_errors"] == evaluate(expected)["test_errors"]
    assert len(history) == 4 and history == json.loads(json.dumps(history))
    seconds = [record["seconds"] for record in history]
    assert seconds == sorted(seconds) and seconds[0] > 0
    tiny.assert_equal(state, expected)


def test_metrics_are_fetched_after_the_next_unit_was_dispatched():
    events = []

    def noted(state, unit):
        events.append(f"unit {unit + 1}")
        return advance(state, unit)

    _, history = fit(3, advance=noted, on_record=[lambda r: events.append(f"got {r['unit']}")])
    assert events == ["unit 1", "unit 2", "got 1", "unit 3", "got 2", "got 3"]
    assert [record["unit"] for record in history] == [1, 2, 3]


@pytest.mark.parametrize("save_every", [1, 2])
def test_an_interrupted_run_is_the_same_run(tmp_path, save_every):
    expected, records = fit(5)

    def interrupted(state, unit):
        if unit == 3:
            raise KeyboardInterrupt
        return advance(state, unit)

    with pytest.raises(KeyboardInterrupt):
        fit(5, tmp_path, interrupted, save_every=save_every)
    kept = 3 if save_every == 1 else 2
    assert steps_in(tmp_path)[-1] == kept
    new = []
    state, history = fit(5, tmp_path, save_every=save_every, on_record=[new.append])
    tiny.assert_equal(state, expected)
    assert timeless(history) == timeless(records)
    assert [record["unit"] for record in new] == list(range(kept + 1, 6))
    seconds = [record["seconds"] for record in history]
    assert seconds == sorted(seconds)


def test_a_finished_run_is_only_read(tmp_path):
    expected, records = fit(2, tmp_path)
    state, history = fit(2, tmp_path, advance=None)
    tiny.assert_equal(state, expected)
    assert history == records


def test_a_damaged_checkpoint_costs_its_units_alone(tmp_path, caplog):
    expected, records = fit(4, tmp_path)
    files = [path for path in (tmp_path / "4").rglob("*") if path.is_file()]
    biggest = max(files, key=lambda path: path.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[:-100])
    state, history = fit(4, tmp_path)
    assert f"{tmp_path}/4 is damaged" in caplog.text
    tiny.assert_equal(state, expected)
    assert timeless(history) == timeless(records)


def test_saves_every_so_often_and_at_the_end(tmp_path):
    saved = []
    with checkpoints.open_dir(tmp_path) as manager:

        def noted(state, unit):
            saved.append(manager.latest_step())
            return advance(state, unit)

        loop.fit(
            noted, fresh(jax.random.key(0)), 5, evaluate=evaluate, manager=manager, save_every=2
        )
    assert saved == [None, None, 2, 2, 4]
    assert steps_in(tmp_path) == [4, 5]


def test_the_best_is_kept(tmp_path):
    values = [5.0, 1.0, 4.0, 3.0, 2.0]

    def worsen(state):  # two members, whose mean counts
        value = jnp.asarray(values)[state.step // STEPS - 1]
        return {"error": jnp.stack([value - 1, value + 1])}

    with checkpoints.open_dir(tmp_path, "error") as manager:
        state = fresh(jax.random.key(0))
        loop.fit(advance, state, 5, evaluate=worsen, manager=manager, best_metric="error")
        best = checkpoints.restore_best(manager, fresh(jax.random.key(0)), "error")
    assert steps_in(tmp_path) == [2, 4, 5]
    assert best.step == 2 and best.history[-1]["error"] == [0.0, 2.0]


@pytest.mark.parametrize("row", [3, 17])
def test_a_bad_example_stops_the_run_at_its_step(tmp_path, row):
    def poisoned(state, unit):
        examples = make_examples(row if unit == 2 else None)
        return ADVANCE(state, examples, jax.random.key(1), tiny.hyper())

    order = ADVANCE(
        fresh(jax.random.key(0))._replace(step=jnp.int32(2 * STEPS)),
        make_examples(row),
        jax.random.key(1),
        tiny.hyper(),
    )
    at = 2 * STEPS + int((~np.isfinite(order[1]["loss"])).argmax())
    expected, _ = fit(2)
    message = (
        rf"the loss is nan at step {at} \(unit 3\); "
        rf"the last good checkpoint is {re.escape(str(tmp_path))}/2\. A lower"
    )
    with pytest.raises(UserError, match=message):
        fit(5, tmp_path, poisoned)
    assert steps_in(tmp_path) == [1, 2]
    with checkpoints.open_dir(tmp_path) as manager:
        restored = checkpoints.restore_newest(manager, fresh(jax.random.key(0)))
    tiny.assert_equal(restored.state, expected)


def test_a_bad_loss_without_a_checkpoint(tmp_path):
    def poisoned(state, unit):
        return ADVANCE(state, make_examples(0), jax.random.key(1), tiny.hyper())

    with pytest.raises(UserError, match=r"unit 1\); there is no checkpoint before it\. A lower"):
        fit(3, tmp_path, poisoned)
    assert steps_in(tmp_path) == []
    with pytest.raises(UserError, match=r"unit 1\)\. A lower"):
        fit(3, advance=poisoned)


def test_members_are_recorded_one_by_one_and_a_bad_one_is_named():
    keys = jax.random.split(jax.random.key(0), 3)
    fresh_members, evaluate_members = jax.jit(jax.vmap(fresh)), jax.jit(jax.vmap(evaluate))

    def train(bad_member=None):
        def advance(states, unit):
            if bad_member is not None and unit == 1:
                kernel = states.params["output"]["kernel"].at[bad_member].set(jnp.inf)
                states.params["output"]["kernel"] = kernel
            return ADVANCE_MEMBERS(states, make_examples(), keys, tiny.hyper())

        return loop.fit(advance, fresh_members(keys), 2, evaluate=evaluate_members)

    _, history = train()
    for name in ("step", "train_loss", "train_errors", "test_errors"):
        assert len(history[1][name]) == 3
    assert history[1]["step"] == [6, 6, 6]
    with pytest.raises(UserError, match=r"the loss of member 1 is nan at step 3 \(unit 2\)"):
        train(bad_member=1)
