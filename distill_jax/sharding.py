"""Devices, meshes and shardings; the only file that names them.

One mesh serves the paper's three kinds of parallelism (section 5.1): "member" (an ensemble or a sweep
of models), "data" (replicas on different examples), "model" (one model's neurons spread out).

Programs are written for whole arrays. Only where arrays lie is said here: XLA splits the work after
them, and puts in the communication.
"""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax import layers, layouts, processes
from distill_jax.batches import check_rows, count_rows
from distill_jax.epochs import Epoch, of_members
from distill_jax.errors import UserError
from distill_jax.fused_loss import on_one_device
from distill_jax.train_step import Batch, Constants, Hyper, TrainState, TrainStep

AXES = ("member", "data", "model")


def make_mesh(
    member: int = 1, data: int = -1, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices, or over some; a size of -1 takes what the others leave.

    Neighbours on "model", which communicate most, then those on "data", are near each other: by a TPU's
    topology, elsewhere in one process as far as the sizes allow.

    Raises:
        UserError: if the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [member, data, model]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if int(np.prod(sizes)) != len(devices) or min(sizes) < 1:
        asked = dict(zip(AXES, (member, data, model), strict=True))
        raise UserError(f"mesh {asked} doesn't fit the {len(devices)} devices")
    return Mesh(mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True), AXES)


def state_shardings(state: TrainState, mesh: Mesh, *leading: str) -> TrainState:
    """Where each array of a state lies: the layers of `models.mlp` are split over "model".

    The output layer is split by its units, the classes, so that logits and losses are. Counted back
    from it, the hidden layers are split by inputs and by units in turn: what a layer split by units
    gives is what the next one, split by inputs, needs, and a pair takes one reduction in each
    direction. With an odd number of them the first is split by the network's inputs. If "model"
    doesn't divide the classes, the output layer is whole. All else is whole too, such as a
    convolutional trunk and the model's state.

    What an optimizer keeps of a weight lies as it does, and if it is large it is split over "data" too:
    each replica updates its own part of the weight, and all get the new parts (weight-update sharding,
    Xu et al., arXiv 2004.13336; stage 1 of ZeRO, arXiv 1910.02054). Not on TPUs, whose compiler sends
    all gradients to all replicas of a slice even so: sending the parts takes longer than the update.

    Args:
        state: of arrays, or of their shapes.
        mesh: from `make_mesh`.
        leading: the mesh's axes over which the leading axes of all leaves are split: "member" for M
            states.

    Returns:
        A NamedSharding for each leaf.

    Raises:
        UserError: for a hidden layer that "model" doesn't divide; if "model" has several devices, and
            no layer can be split over them.
    """
    depths = layouts.depths_of(path for path, _ in jax.tree.leaves_with_path(state))
    on_tpu = mesh.devices.flat[0].platform == "tpu"

    def sharding(path: tuple[Any, ...], leaf: Array) -> NamedSharding:
        split = layouts.of_weight(path, leaf.shape, depths, mesh.shape["model"])
        if path[0] == jax.tree_util.GetAttrKey("opt_state") and not on_tpu:
            split = layouts.of_update(split, leaf.shape[len(leading) :], mesh.shape)
        return NamedSharding(mesh, PartitionSpec(*leading, *split))

    found = jax.tree.map_with_path(sharding, state)
    if mesh.shape["model"] > 1 and not any("model" in one.spec for one in jax.tree.leaves(found)):
        raise UserError(
            f"mesh.model is {mesh.shape['model']}, but no layer can be split over it: only layers named "
            f"{layers.OUTPUT!r} and 'hidden_0', 'hidden_1', ... are split, if it divides their units"
        )
    return found


def compile_step(step: TrainStep, mesh: Mesh, state: TrainState) -> TrainStep:
    """Compiles a step for batches split over the mesh's "data" axis; the state is donated.

    It is called with all five arguments, `None` for constants if there are none.

    The step is written in the global view: its mean is over the whole batch, however many devices
    hold it.

    Args:
        step: from `make_train_step`.
        mesh: from `make_mesh`.
        state: one that will be trained, or its shapes: it will lie as `state_shardings` says.

    Raises:
        UserError: as `state_shardings` does.
    """
    whole, split = NamedSharding(mesh, PartitionSpec()), _split(mesh, "data")
    own = state_shardings(state, mesh)
    return jax.jit(
        step,
        in_shardings=(own, split, whole, whole, whole),
        out_shardings=(own, whole),
        donate_argnums=0,
    )


def compile_pmap_step(step: TrainStep) -> TrainStep:
    """Compiles a step made with `axis_name="data"` under `jax.pmap`, one replica per local device.

    It is called as a step of `compile_step` is: the batch is cut over the devices, the state is whole
    on each. For programs that are built on pmap; `compile_step` is the way this project runs.
    """
    count = jax.local_device_count()
    in_axes = (None, 0, None, None, None)
    mapped = jax.pmap(step, axis_name="data", in_axes=in_axes, out_axes=None)

    def run(
        state: TrainState, batch: Batch, key: Array, hyper: Hyper, constants: Constants = None, /
    ) -> tuple[TrainState, dict[str, Array]]:
        size = count_rows(batch["inputs"])
        check_divides(size, count, "the batch size", "devices")
        check_rows(batch, size, "devices share a batch of")
        cut = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        return mapped(state, cut, key, hyper, constants)

    return run


def compile_epoch(
    run_epoch: Epoch,
    mesh: Mesh,
    per_member: Mapping[str, bool],
    constants_per_member: Mapping[str, bool] = types.MappingProxyType({}),
    *,
    vmapped: bool = True,
) -> Epoch:
    """Compiles an epoch of M members as one program: vmapped, and sharded over "member".

    Args:
        run_epoch: from `make_epoch`, for one model.
        mesh: the members are split over "member", each batch over "data", and each net over "model"
            as `state_shardings` says.
        per_member: for every field of the examples, whether it has a leading member axis
            `[M, N, ...]` (the soft targets of each member's own teacher) or is shared `[N, ...]`.
        constants_per_member: the same for the constants, a dict.
        vmapped: if false, and "member" is 1, the program has one member after the other.

    Returns:
        `(states, examples, keys [M], hyper of [M], constants) -> (states, metrics [M, steps])`; the
        states are donated. Bring the examples and constants there by `put_examples`, or blocks of
        batches by `put_rows`.

    Raises:
        UserError: when called, as `state_shardings` does.
    """
    member, over_devices = _split(mesh, "member"), mesh.shape["member"] > 1
    run_members = of_members(
        run_epoch,
        per_member,
        constants_per_member,
        vmapped=vmapped or over_devices,
        over_devices=over_devices,
    )

    def run(states: TrainState, examples: Batch, keys: Array, hyper: Hyper, constants: Batch):
        states, metrics = run_members(_lay_out(states, mesh), examples, keys, hyper, constants)
        return _lay_out(states, mesh), metrics

    return jax.jit(
        run,
        in_shardings=(None, None, member, member, None),
        out_shardings=(None, member),
        donate_argnums=0,
    )


def keep_layout(step: TrainStep, mesh: Mesh) -> TrainStep:
    """The step, whose state stays where `state_shardings` has it: for steps inside of a program.

    Else XLA chooses, and may leave new weights where they were updated and send them at each use.
    """
    if mesh.size == 1:
        return step  # nothing to lay out, and a tenth less to compile

    def run(
        state: TrainState, batch: Batch, key: Array, hyper: Hyper, constants: Constants = None, /
    ) -> tuple[TrainState, dict[str, Array]]:
        shardings = state_shardings(state, mesh)
        state = jax.lax.with_sharding_constraint(state, shardings)
        state, metrics = step(state, batch, key, hyper, constants)
        return jax.lax.with_sharding_constraint(state, shardings), metrics

    return run


def split_update(
    optimizer: optax.GradientTransformationExtraArgs, mesh: Mesh, dtype: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, whose updates are computed where `state_shardings` has its state.

    The gradients are made as their weights lie, and then cut. Left to itself XLA may make them where
    the update is, and send activations there; or send the weights for each of an update's operations.

    Args:
        optimizer: any.
        mesh: from `make_mesh`.
        dtype: that the gradients are made in, if it is narrower than their weights'. They are cut in it,
            or the compiler of GPUs doesn't join the sum and the cut to a reduce-scatter.
    """
    if mesh.shape["data"] == 1:
        return optimizer
    put = jax.lax.with_sharding_constraint

    def cut(gradient: Array, whole: NamedSharding, part: NamedSharding) -> Array:
        made = gradient if dtype is None or part == whole else gradient.astype(dtype)
        return put(put(made, whole), part).astype(gradient.dtype)

    def update(gradients: Any, state: Any, params: Any = None, **numbers: Any) -> Any:
        _, whole, parts, _ = state_shardings(
            TrainState(jnp.zeros(()), gradients, {"gradients": gradients}), mesh
        )
        parts = parts["gradients"]
        gradients = jax.tree.map(cut, gradients, whole, parts)
        params = None if params is None else put(params, parts)
        updates, state = optimizer.update(gradients, state, params, **numbers)
        return put(updates, parts), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def init_members(init: Callable[[Any], TrainState], starts: Any, mesh: Mesh) -> TrainState:
    """M fresh states `[M, ...]`, split over "member", and each over "model" (`state_shardings`).

    Args:
        init: makes one state of one start.
        starts: keys `[M]`, or parameters to start from, each leaf `[M, ...]`.
        mesh: its size of "member" divides M.

    Raises:
        UserError: if it doesn't, or "model" doesn't divide a hidden layer.
    """
    count = jax.tree.leaves(starts)[0].shape[0]
    check_divides(count, mesh.shape["member"], "the number of members", "member devices")
    shapes = jax.eval_shape(jax.vmap(init), starts)
    return jax.jit(jax.vmap(init), out_shardings=state_shardings(shapes, mesh, "member"))(starts)


def put_examples(examples: Mapping[str, Any], mesh: Mesh, per_member: Mapping[str, bool]) -> Batch:
    """Copies examples to the devices once, for `compile_epoch`.

    Every process brings all of them, and they must be the same on all: nothing is sent or compared.
    """

    def put(leaf: Any, sharding: NamedSharding) -> Array:
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    shardings = example_shardings(mesh, per_member)
    return {  # a field may be a tree, such as a frozen net's parameters
        name: jax.tree.map(functools.partial(put, sharding=shardings[name]), field)
        for name, field in examples.items()
    }


def example_shardings(mesh: Mesh, per_member: Mapping[str, bool]) -> dict[str, NamedSharding]:
    """Where each field of examples lies: split over "member", or whole on all devices."""
    whole, member = NamedSharding(mesh, PartitionSpec()), _split(mesh, "member")
    return {name: member if own else whole for name, own in per_member.items()}


def own_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The examples of a global batch that this process has to load.

    Returns:
        Their positions in 0..batch_size-1, ascending: int64. Processes whose devices differ only on
        the axes "member" and "model" load the same ones; together they load all.

    Raises:
        UserError: for a batch that "data" doesn't divide, or a mesh in which two processes share some
            rows, but not all.
    """
    check_divides(batch_size, mesh.shape["data"], "batch_size", "data devices")
    process_of = np.vectorize(lambda device: device.process_index)(mesh.devices)
    indices = np.unique(process_of)
    holds = np.array([(process_of == index).any((0, 2)) for index in indices])
    if (np.unique(holds, axis=0).sum(0) != 1).any():
        raise UserError(
            f"on the mesh {dict(mesh.shape)} some of {len(indices)} processes share rows of a batch "
            "and don't share others: choose sizes of which one divides the devices of a process, or "
            "is a multiple of them"
        )
    own = holds[indices == jax.process_index()].any(0)
    return np.flatnonzero(np.repeat(own, batch_size // mesh.shape["data"]))


def on_first(mesh: Mesh) -> NamedSharding:
    """Whole, on the mesh's first device alone."""
    return NamedSharding(Mesh(mesh.devices.reshape(-1)[:1], ("alone",)), PartitionSpec())


def put_rows(fields: Mapping[str, Any], mesh: Mesh, batch_axis: int = 0) -> Batch:
    """Makes global batches, split over "data", of what each process has loaded.

    Args:
        fields: the process's own rows, `own_rows` of a global batch, on the axis `batch_axis`; all
            else is whole, and the same on all processes.
        mesh: as for `own_rows`.
        batch_axis: 0 for one batch `[B, ...]`, 1 for the batches of several steps `[steps, B, ...]`.
    """
    sharding = rows_sharding(mesh, batch_axis)
    return jax.tree.map(
        lambda field: jax.make_array_from_process_local_data(sharding, field), dict(fields)
    )


def rows_sharding(mesh: Mesh, batch_axis: int) -> NamedSharding:
    """Where `put_rows` puts a field: its axis `batch_axis` split over "data"."""
    return NamedSharding(mesh, PartitionSpec(*[None] * batch_axis, "data"))


def shard_batch(mesh: Mesh, batch_size: int) -> Callable[[Batch], Batch]:
    """For `make_epoch`: a gathered batch is split over the mesh's "data" axis.

    The teacher's logits are split over "model" too, as the student's are.
    """
    check_divides(batch_size, mesh.shape["data"], "batch_size", "data devices")
    rows = _split(mesh, "data")
    classes = NamedSharding(mesh, PartitionSpec("data", "model"))

    def shard(batch: Batch) -> Batch:
        return {
            name: jax.lax.with_sharding_constraint(
                field,
                classes
                if name == "teacher_logits" and field.shape[-1] % mesh.shape["model"] == 0
                else rows,
            )
            for name, field in batch.items()
        }

    return shard


def over_data(mesh: Mesh) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For `fused_loss.mean_loss` of a batch that is split over "data".

    Every device goes through its own examples in chunks and sums the output layer's gradient by itself;
    the sums meet once, after the last chunk. What a pass returns besides is of examples.
    """
    count = mesh.shape["data"]
    rows = _split(mesh, "data")

    def cut(x: Array) -> Array:
        shards = x.reshape(count, -1, *x.shape[1:])
        return jax.lax.with_sharding_constraint(shards, rows)

    def join(x: Array) -> Array:
        return jax.lax.with_sharding_constraint(x.reshape(-1, *x.shape[2:]), rows)

    def over(run: Callable[..., Any]) -> Callable[..., Any]:
        def spread(hidden: Array, layer: Any, fields: Any, constants: Any, *weights: Array):
            own = jax.tree.map(cut, (hidden, fields, weights))
            found = jax.vmap(
                lambda hidden, fields, weights: run(hidden, layer, fields, constants, *weights),
                spmd_axis_name="data",
            )(*own)
            if not weights:
                return jax.tree.map(join, found)
            outcome, (back, total) = found
            total = jax.tree.map(lambda x: jnp.sum(x, axis=0), total)
            return jax.tree.map(join, outcome), (join(back), total)

        return spread

    return on_one_device if count == 1 else over


def any_process(value: bool) -> Array | bool:
    """Whether a value is true on any process; dispatched, to be read later by `processes.fetch`.

    All processes must call it, in the same order as they dispatch everything else.
    """
    if processes.count() == 1:
        return value
    devices = Mesh(np.array(jax.devices()), ("device",))
    one_each = NamedSharding(devices, PartitionSpec("device"))
    values = jax.make_array_from_callback(
        (devices.size,), one_each, lambda index: np.array([value])
    )
    found = _compile_any(NamedSharding(devices, PartitionSpec()))(values)
    return processes.serialize_on_cpu(found)


def check_divides(number: int, parts: int, what: str, devices: str) -> None:
    """Raises a UserError unless `number` divides into `parts`."""
    if number % parts:
        raise UserError(f"{what} is {number}, which doesn't divide over {parts} {devices}")


@functools.cache
def _compile_any(whole: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(jnp.any, out_shardings=whole)


def _lay_out(states: TrainState, mesh: Mesh) -> TrainState:
    shardings = state_shardings(states, mesh, "member")
    return jax.lax.with_sharding_constraint(states, shardings)


def _split(mesh: Mesh, axis: str) -> NamedSharding:
    """The leading axis over one axis of the mesh, all else whole."""
    return NamedSharding(mesh, PartitionSpec(axis))
