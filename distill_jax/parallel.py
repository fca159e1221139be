"""Devices, meshes and shardings; the only file that names them.

One mesh serves the paper's three kinds of parallelism (section 5.1): "member" (an ensemble or a sweep
of models), "data" (replicas on different examples), "model" (one model's neurons spread out; the axis
is there, but nothing is split over it yet).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distill_jax.data.epochs import Epoch
from distill_jax.errors import UserError
from distill_jax.training import Batch, Hyper, TrainState, TrainStep

AXES = ("member", "data", "model")


def make_mesh(member: int = 1, data: int = -1, model: int = 1) -> Mesh:
    """A mesh over all devices; a size of -1 takes what the others leave.

    Raises:
        UserError: if the sizes don't multiply to the number of devices.
    """
    devices = jax.devices()
    sizes = [member, data, model]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if sizes.count(-1) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if int(np.prod(sizes)) != len(devices) or min(sizes) < 1:
        asked = dict(zip(AXES, (member, data, model), strict=True))
        raise UserError(f"mesh {asked} doesn't fit the {len(devices)} devices")
    return Mesh(np.array(devices).reshape(sizes), AXES)


def compile_step(step: TrainStep, mesh: Mesh) -> TrainStep:
    """Compiles a step for batches split over the mesh's "data" axis; the state is donated.

    The step is written in the global view: its mean is over the whole batch, however many devices
    hold it.
    """
    replicated, split = NamedSharding(mesh, PartitionSpec()), _split(mesh, "data")
    return jax.jit(
        step,
        in_shardings=(replicated, split, replicated, replicated),
        out_shardings=replicated,
        donate_argnums=0,
    )


def compile_pmap_step(step: TrainStep) -> TrainStep:
    """Compiles a step made with `axis_name="data"` under `jax.pmap`, one replica per local device.

    Same arguments and results as `compile_step`: the batch is cut over the devices, the state is
    whole on each. For programs that are built on pmap; `compile_step` is the way this project runs.
    """
    count = jax.local_device_count()
    mapped = jax.pmap(step, axis_name="data", in_axes=(None, 0, None, None), out_axes=None)

    def run(state: TrainState, batch: Batch, key: Array, hyper: Hyper):
        check_divides(batch["label"].shape[0], count, "the batch size", "devices")
        cut = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
        return mapped(state, cut, key, hyper)

    return run


def compile_epoch(run_epoch: Epoch, mesh: Mesh, per_member: Mapping[str, bool]) -> Epoch:
    """Compiles an epoch of M members as one program: vmapped, and sharded over "member".

    Args:
        run_epoch: from `make_epoch`, for one model.
        mesh: the members are split over "member", each batch over "data".
        per_member: for every field of the examples, whether it has a leading member axis
            `[M, N, ...]` (the soft targets of each member's own teacher) or is shared `[N, ...]`.

    Returns:
        `(states, examples, keys [M], hyper of [M]) -> (states, metrics [M, steps])`; the states are
        donated. Bring the examples there by `put_examples`.

    Raises:
        UserError: for a mesh with more than one device on "model": they would all do the same.
    """
    if mesh.shape["model"] != 1:
        raise UserError(
            f"the mesh has {mesh.shape['model']} devices on its axis model, but nothing is split over "
            "it yet: set mesh.model to 1"
        )
    member, shared = _split(mesh, "member"), NamedSharding(mesh, PartitionSpec())
    mapped = jax.vmap(
        run_epoch,
        in_axes=(0, {name: 0 if own else None for name, own in per_member.items()}, 0, 0),
        spmd_axis_name="member",
    )

    def run(states: TrainState, examples: Batch, keys: Array, hyper: Hyper):
        if len(keys) > 1:
            return mapped(states, examples, keys, hyper)
        # An axis of one member makes no difference but in time: a tenth of a step on a CPU.
        own = {name: field[0] if per_member[name] else field for name, field in examples.items()}
        state, hyper = jax.tree.map(lambda leaf: leaf[0], (states, hyper))
        return jax.tree.map(lambda leaf: leaf[None], run_epoch(state, own, keys[0], hyper))

    examples = {name: member if own else shared for name, own in per_member.items()}
    return jax.jit(
        run,
        in_shardings=(member, examples, member, member),
        out_shardings=member,
        donate_argnums=0,
    )


def init_members(init: Callable[[Any], TrainState], starts: Any, mesh: Mesh) -> TrainState:
    """M fresh states `[M, ...]`, split over "member".

    Args:
        init: makes one state of one start.
        starts: keys `[M]`, or parameters to start from, each leaf `[M, ...]`.
        mesh: its size of "member" divides M.
    """
    count = jax.tree.leaves(starts)[0].shape[0]
    check_divides(count, mesh.shape["member"], "the number of members", "member devices")
    return jax.jit(jax.vmap(init), out_shardings=_split(mesh, "member"))(starts)


def put_examples(examples: Mapping[str, Any], mesh: Mesh, per_member: Mapping[str, bool]) -> Batch:
    """Copies examples to the devices once, for `compile_epoch`."""
    return {
        name: jax.device_put(
            field,
            _split(mesh, "member") if per_member[name] else NamedSharding(mesh, PartitionSpec()),
        )
        for name, field in examples.items()
    }


def shard_batch(mesh: Mesh, batch_size: int) -> Callable[[Batch], Batch]:
    """For `make_epoch`: a gathered batch is split over the mesh's "data" axis."""
    check_divides(batch_size, mesh.shape["data"], "batch_size", "data devices")
    return lambda batch: jax.lax.with_sharding_constraint(batch, _split(mesh, "data"))


def check_divides(number: int, parts: int, what: str, devices: str) -> None:
    """Raises a UserError unless `number` divides into `parts`."""
    if number % parts:
        raise UserError(f"{what} is {number}, which doesn't divide over {parts} {devices}")


def _split(mesh: Mesh, axis: str) -> NamedSharding:
    """The leading axis over one axis of the mesh, all else whole."""
    return NamedSharding(mesh, PartitionSpec(axis))
