"""The same numbers on every mesh, and no more communication than they need."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distill_jax import layouts, models, optimizers, sharding, step_losses, train_step
from distill_jax.epochs import make_epoch
from distill_jax.errors import UserError
from experiments.compiled.collectives import Collective, collectives

MESHES = [(1, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
N, BATCH, MEMBERS, CLASSES, K = 48, 16, 2, 64, 3
HIDDEN = (24, 40, 32)  # split by inputs, by units, by inputs; then the classes
MODEL = models.mlp(HIDDEN, CLASSES, input_dropout=0.2, hidden_dropout=0.5)
OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0), max_norm=1.0)
PER_MEMBER = {
    "id": False,
    "inputs": False,
    "label": False,
    "teacher_logits": True,
    "teacher_ids": False,
    "teacher_probabilities": False,
    "teacher_tail": False,
}
HYPER = {
    "learning_rate": jnp.array([0.1, 0.03]),
    "temperature": jnp.array([1.0, 4.0]),
    "hard_weight": jnp.array([0.3, 0.0]),
}


def mesh_of(sizes):
    devices = np.array(jax.devices()[: int(np.prod(sizes))])
    return Mesh(devices.reshape(sizes), sharding.AXES)


def examples(count=N):
    random = np.random.default_rng(0)
    return {
        "id": np.arange(count, dtype=np.int32),
        "inputs": random.integers(0, 256, (count, 8, 8), np.uint8),
        "label": random.integers(0, CLASSES, count).astype(np.int32),
        "teacher_logits": 3 * random.standard_normal((MEMBERS, count, CLASSES)).astype(np.float32),
        "teacher_ids": np.argsort(random.random((count, CLASSES)))[:, :K].astype(np.uint16),
        "teacher_probabilities": np.full((count, K), 0.25, jnp.bfloat16),
        "teacher_tail": np.full(count, 0.25, np.float32),
    }


def init(key):
    return train_step.init_state(MODEL, OPTIMIZER, key, jnp.zeros((1, 8, 8), jnp.uint8))


@functools.cache
def keys_and_states():
    keys = jax.random.split(jax.random.key(5), MEMBERS)
    return keys, jax.device_get(sharding.init_members(init, keys, mesh_of((1, 1, 1))))


# LLVM's level, after XLA has split the work: programs that compile in half the time.
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def program(sizes, loss, micro_batches=1):
    """A compiled epoch of all members on a mesh: its text, and what trains two of them."""
    mesh = mesh_of(sizes)
    optimizer = sharding.split_update(OPTIMIZER, mesh)
    step = train_step.make_train_step(MODEL, optimizer, loss, micro_batches=micro_batches)
    step = sharding.keep_layout(step, mesh)
    run_epoch = make_epoch(step, BATCH, shard_batch=sharding.shard_batch(mesh, BATCH))
    keys, states = keys_and_states()
    placed = sharding.put_examples(examples(), mesh, PER_MEMBER)

    def fresh():
        return jax.device_put(states, sharding.state_shardings(states, mesh, "member"))

    jitted = sharding.compile_epoch(run_epoch, mesh, PER_MEMBER)
    compiled = jitted.lower(fresh(), placed, keys, HYPER, {}).compile(QUICK)

    def train():
        states, first = compiled(fresh(), placed, keys, HYPER, {})
        states, second = compiled(states, placed, keys, HYPER, {})
        return states, jax.device_get((first, second))

    return compiled.as_text(), train


@functools.cache
def trained(sizes, loss):
    states, history = program(sizes, loss)[1]()
    return jax.device_get(states), history


DENSE = step_losses.distillation_loss
TOP_K = step_losses.top_k_distillation_loss(np.linspace(1, 2, CLASSES))


def two_losses(logits, batch, hyper, constants):
    return step_losses.label_loss(logits, batch, hyper) + TOP_K(logits, batch, hyper)


@pytest.mark.parametrize(
    ("sizes", "loss"), [*((sizes, DENSE) for sizes in MESHES[1:]), ((2, 2, 2), two_losses)]
)
def test_the_same_numbers_on_every_mesh(sizes, loss):
    # Six steps with dropout; sums are rounded in another order.
    found, expected = trained(sizes, loss), trained((1, 1, 1), loss)
    assert expected[1][1]["loss"].shape == (MEMBERS, 3)
    tiny.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_state_stays_where_it_lies():
    mesh = mesh_of((2, 2, 2))
    states, _ = program((2, 2, 2), DENSE)[1]()
    shardings = sharding.state_shardings(states, mesh, "member")
    jax.tree.map(
        lambda leaf, sharding: tiny.assert_equal(
            leaf.sharding.is_equivalent_to(sharding, leaf.ndim), True
        ),
        states,
        shardings,
    )
    kernel = states.params["output"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 32, CLASSES // 2)


def test_fresh_members_are_the_same_on_every_mesh():
    keys, states = keys_and_states()
    tiny.assert_equal(jax.device_get(sharding.init_members(init, keys, mesh_of((2, 2, 2)))), states)


def over(axis, found):
    return [collective for collective in found if axis in collective.axes]


@pytest.mark.parametrize("sizes", MESHES)
def test_communication_of_a_step(sizes):
    mesh = mesh_of(sizes)
    found = collectives(program(sizes, DENSE)[0], mesh)
    assert all(len(collective.axes) == 1 for collective in found)
    assert not over("member", found)

    member, data, model = sizes
    values = 4 * MEMBERS // member  # bytes of a float32 of each member of a device
    states = keys_and_states()[1]
    shardings = sharding.state_shardings(states, mesh, "member").params
    shards = jax.tree.map(lambda x, s: s.shard_shape(x.shape), states.params, shardings)
    own = sum(np.prod(s[1:]) for s in jax.tree.leaves(shards, is_leaf=lambda s: type(s) is tuple))
    # All gradients and the loss's sum at once, and the errors and known labels, which are integers.
    gradients = [("all-reduce", 2 * values), ("all-reduce", values * (own + 1))]
    assert sorted(c[:2] for c in over("data", found)) == (gradients if data > 1 else [])

    rows = values * BATCH // data  # bytes of a [B] on a device
    large = [c for c in over("model", found) if c.bytes >= rows * min(HIDDEN)]
    small = [c for c in over("model", found) if c not in large]
    # Forward into hidden_0 and hidden_2; backward out of the output layer and hidden_1.
    assert len(large) == (4 if model > 1 else 0)
    assert {c.kind for c in large} <= {"all-reduce"}
    assert all(c.bytes < rows * CLASSES for c in large)
    # Numbers of each example for the loss, the winners of each part for the errors, and the lengths
    # of the incoming weights for the limit on them.
    assert sum(c.bytes for c in small) <= rows * (12 + 2 * model) + values * (24 + 32)
    assert bool(small) == (model > 1)


@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 2)])
def test_each_replica_updates_its_part_of_a_large_weight(sizes, monkeypatch):
    monkeypatch.setattr(layouts, "LARGE", 1)  # every kernel and bias
    text, train = program.__wrapped__(sizes, DENSE)
    states, history = train()
    tiny.assert_close(
        (jax.device_get(states), history), trained((1, 1, 1), DENSE), rtol=1e-4, atol=1e-5
    )

    moments = [leaf for leaf in jax.tree.leaves(states.opt_state) if leaf.ndim == 3]
    assert len(moments) == len(HIDDEN) + 1
    assert all("data" in moment.sharding.spec for moment in moments)
    # Each kernel's new parts are sent, and no more than all weights.
    sent = [c for c in over("data", collectives(text, mesh_of(sizes))) if c.kind == "all-gather"]
    bytes_of = [
        4 * np.prod(w.sharding.shard_shape(w.shape)) for w in jax.tree.leaves(states.params)
    ]
    assert len(sent) >= len(moments)
    assert sum(c.bytes for c in sent) <= sum(bytes_of)


def test_micro_batches_send_no_examples():
    text, _ = program((1, 4, 1), DENSE, micro_batches=2)
    found = collectives(text, mesh_of((1, 4, 1)))
    assert [c[0::2] for c in found] == [("all-reduce", ("data",))] * 2


SPLIT = {
    "distillation": DENSE,
    "labels": step_losses.label_loss,
    "top k": TOP_K,
    "modified labels": step_losses.label_modified_loss,
    "logit matching": step_losses.logit_matching_loss,
    "errors": lambda logits, batch, hyper, constants=None: (
        jnp.argmax(logits, axis=-1).astype(jnp.int32) != batch["label"]
    ).astype(jnp.float32),
}


def split_loss(loss):
    """Value and gradient of a loss of split logits, those of whole ones, and the collectives."""
    mesh = mesh_of((1, 2, 4))
    batch = {name: jnp.asarray(field) for name, field in examples(BATCH).items()}
    batch["teacher_logits"] = batch["teacher_logits"][0]
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((BATCH, CLASSES)), jnp.float32)
    logits = logits.at[0, :5].set(-jnp.inf).at[1].set(0.0)  # classes left out; all are the same
    batch["teacher_logits"] = batch["teacher_logits"].at[0, :5].set(-jnp.inf)
    batch["label"] = batch["label"].at[0].set(7)
    hyper = jax.tree.map(lambda x: x[0], HYPER)

    def mean(logits, batch, hyper):
        values = loss(logits, batch, hyper)
        return jnp.mean(values), values

    function = jax.value_and_grad(mean, has_aux=True)
    rows, classes = (NamedSharding(mesh, P(*axes)) for axes in [("data",), ("data", "model")])
    lies = {name: classes if name == "teacher_logits" else rows for name in batch}
    jitted = jax.jit(function, in_shardings=(classes, lies, None))
    compiled = jitted.lower(logits, batch, hyper).compile()
    found = collectives(compiled.as_text(), mesh)
    placed = jax.device_put((logits, batch), (classes, lies))
    hyper = jax.device_put(hyper, NamedSharding(mesh, P()))
    return compiled(*placed, hyper), jax.jit(function)(logits, batch, hyper), found


def check_no_logits_are_sent(found):
    assert all(c.bytes == 4 and c.kind == "all-reduce" for c in over("data", found))
    assert all(c.bytes <= 4 * (BATCH // 2) * 8 for c in found)  # 8 numbers of each example
    assert over("model", found)


@pytest.mark.parametrize("name", SPLIT)
def test_a_loss_of_logits_that_are_split_over_classes(name):
    split, whole, found = split_loss(SPLIT[name])
    tiny.assert_close(split, whole)
    check_no_logits_are_sent(found)


def test_gathered_logits_are_noticed():
    _, _, found = split_loss(lambda logits, batch, hyper: jnp.sort(logits)[:, -1])
    with pytest.raises(AssertionError):
        check_no_logits_are_sent(found)


def specs(model, classes_of=(1, 2, 2), optimizer=OPTIMIZER, leading=()):
    mesh = mesh_of(classes_of)
    state = jax.eval_shape(
        lambda: train_step.init_state(
            model, optimizer, jax.random.key(0), jnp.zeros((1, 8, 8), jnp.uint8)
        )
    )
    return jax.tree.map(lambda s: s.spec, sharding.state_shardings(state, mesh, *leading))


def test_layers_are_split_by_units_and_inputs_in_turn():
    params = specs(models.mlp([16, 24], 10)).params
    assert params == {
        "hidden_0": {"kernel": P(None, "model"), "bias": P("model")},
        "hidden_1": {"kernel": P("model", None), "bias": P()},
        "output": {"kernel": P(None, "model"), "bias": P("model")},
    }
    assert specs(models.mlp([16, 24], 10), leading=("member",)).params["hidden_1"] == {
        "kernel": P("member", "model", None),
        "bias": P("member"),
    }
    first = specs(models.mlp([16, 24, 32], 10)).params["hidden_0"]
    assert first == {"kernel": P("model", None), "bias": P()}


def test_moments_lie_as_their_weights_do():
    state = specs(MODEL, optimizer=optimizers.adam(optax.constant_schedule(1.0), max_norm=1.0))
    moments = state.opt_state[0]
    assert state.step == moments.count == P()
    assert moments.mu == moments.nu == state.params


def test_a_trunk_is_whole_and_so_are_classes_that_do_not_divide():
    net = models.chain(models.conv_trunk([4, 8], [2, 2]), models.mlp([16], 10))
    params = specs(net, (1, 1, 4)).params
    assert params["conv_0"] == params["conv_1"] == {"kernel": P(), "bias": P()}
    assert params["hidden_0"]["kernel"] == P("model", None)
    assert params["output"] == {"kernel": P(), "bias": P()}


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ([20, 16], "hidden_0 has 20 units, which don't divide over 8 model devices"),
        ([16, 20, 16], "hidden_1 has 20 units, which don't divide over 8 model devices"),
    ],
)
def test_a_layer_that_does_not_divide_is_named(hidden, message):
    with pytest.raises(UserError, match=message):
        specs(models.mlp(hidden, 10), (1, 1, 8))


def test_a_net_of_which_nothing_can_be_split_is_refused():
    small, named = models.mlp([], 10), models.mlp([16], 10)
    renamed = models.Model(lambda *args: {"net": named.init(*args)["output"]}, named.apply)
    for model in (small, renamed):
        with pytest.raises(UserError, match=r"mesh.model is 8, but no layer can be split over it"):
            specs(model, (1, 1, 8), optimizers.adam(lambda step: 1.0))


def test_rows_that_a_process_loads():
    mesh = mesh_of((2, 2, 2))
    np.testing.assert_array_equal(sharding.own_rows(mesh, 6), np.arange(6))
    with pytest.raises(UserError, match="batch_size is 7, which doesn't divide over 2 data"):
        sharding.own_rows(mesh, 7)
    field = np.arange(3 * 6 * 2).reshape(3, 6, 2)
    placed = sharding.put_rows({"inputs": field}, mesh, batch_axis=1)["inputs"]
    np.testing.assert_array_equal(placed, field)
    assert placed.sharding.shard_shape(placed.shape) == (3, 3, 2)


def processes(layout):
    """A mesh of devices that belong to these processes."""
    devices = np.vectorize(lambda process: types.SimpleNamespace(process_index=process))(layout)
    return types.SimpleNamespace(
        devices=devices, shape=dict(zip(sharding.AXES, devices.shape, strict=True))
    )


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        ([[[0], [0], [1], [1]]], [0, 1, 2, 3]),
        ([[[1], [0], [1], [0]]], [2, 3, 6, 7]),
        ([[[0], [0]], [[1], [1]]], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([[[0, 1], [0, 1]]], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([[[0, 0], [1, 1]]], [0, 1, 2, 3]),
    ],
)
def test_rows_of_one_process_of_two(layout, rows):
    np.testing.assert_array_equal(sharding.own_rows(processes(np.array(layout)), 8), rows)


def test_rows_that_processes_share_in_part_are_refused():
    layout = np.array([[[0, 0], [0, 1], [1, 1]]])
    with pytest.raises(UserError, match=r"'data': 3, 'model': 2.* 2 processes share rows"):
        sharding.own_rows(processes(layout), 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32[2,16]{1,0} all-reduce(%a), replica_groups={{0,1},{2,3},{4,5},{6,7}}", (128, "model")),
        (
            "(f32[4]{0}, /*index=1*/s32[]) all-reduce(%a, %b), replica_groups=[4,2]<=[8]",
            (20, "model"),
        ),
        ("pred[9]{0} all-gather(%a), replica_groups=[4,2]<=[2,2,2]T(0,2,1)", (9, "data")),
        ("bf16[3,2]{1,0} reduce-scatter(%a), replica_groups=[4,2]<=[2,4]T(1,0)", (12, "member")),
        ("u8[8]{0} all-to-all(%a), replica_groups=mesh['x'=4,'y'=2] {'y'}", (8, "model")),
        (
            "f32[] all-reduce(%a), replica_groups=mesh['x'=2,'y'=2,'z'=2], "
            "device_ids=([2,2,2]T(0,2,1)) {'y'}",
            (4, "model"),
        ),
        ("f32[] all-reduce(%a), replica_groups={}, to_apply=%add", (4, "member data model")),
        ("f32[2]{0} collective-permute(%a), source_target_pairs={{0,4},{4,0}}", (8, "member")),
        ("(f32[2]{0}, f32[4]{0}) all-gather-start(%a), replica_groups=[4,2]<=[8]", (16, "model")),
        (
            "f32[] all-reduce(%a), replica_groups=mesh['x'=2,'y'=4] {'x','y'}",
            (4, "member data model"),
        ),
    ],
)
def test_collectives_of_a_program(text, expected):
    size, axes = expected
    lines = f"%fusion = f32[] fusion(%a)\n  ROOT %c.1 = {text}, channel_id=1\n"
    kind = text.split("(%")[0].split()[-1].removesuffix("-start")
    assert collectives(lines, mesh_of((2, 2, 2))) == [Collective(kind, size, tuple(axes.split()))]


def test_groups_in_an_unknown_form_are_an_error():
    text = "%c = f32[] all-reduce(%a), replica_groups=mesh['x'=8] {'x':(1)2}"
    with pytest.raises(ValueError, match="no groups of devices in a known form"):
        collectives(text, mesh_of((2, 2, 2)))
