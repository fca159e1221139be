"""Counts the errors of all members on sets of examples, a batch at a time."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax import epochs, sharding
from distill_jax.batches import as_matrices, inputs_of
from distill_jax.models import Model
from distill_jax.recipe import Reader
from distill_jax.train_step import Batch


def compile_errors(
    model: Model, reader: Reader, batch_size: int, mesh: Any = None, *, vmapped: bool = True
) -> Any:
    """Compiles what counts the members' errors on a set of examples, each example once.

    It is `(variables [M, ...], own fields [M, ...], shared fields) -> errors [M]`. Activations and
    logits are of one batch at a time, whatever the size of the set; each batch is split over the mesh's
    "data" axis.

    Args:
        model: of all members.
        reader: makes the batches (`gather_evaluated`), and counts the errors of each.
        batch_size: B, raised to a multiple of the devices on "data".
        mesh: from `sharding.make_mesh`; None for the default device.
        vmapped: if false, and "member" is 1, the program has one member after the other.
    """
    sizes = {"data": 1, "member": 1} if mesh is None else mesh.shape
    devices = sizes["data"]
    batch_size += -batch_size % devices
    shard = sharding.shard_batch(mesh, batch_size) if devices > 1 else None

    def of_batch(variables: Any, examples: Batch, rows: Array) -> Array:
        batch = reader.gather_evaluated(examples, rows)
        if shard is not None and len(rows) % devices == 0:
            # The rest follows them; a field may be of something else than examples.
            batch |= shard({"inputs": inputs_of(batch)})
        return reader.count_errors(model, variables, batch)

    @jax.jit
    def count(variables: Any, own: Batch, shared: Batch) -> Array:
        def of_member(variables: Any, own: Batch) -> Array:
            matrices, images = as_matrices({**own, **shared})

            def one(rows: Array) -> Array:
                return of_batch(variables, images(matrices), rows)

            parts = _cut(epochs.count_examples(matrices), batch_size, devices)
            found = [jnp.sum(jax.lax.map(one, jnp.asarray(rows)), axis=0) for rows in parts]
            return functools.reduce(operator.add, found)

        if vmapped or sizes["member"] > 1:
            axis = None if mesh is None else "member"
            return jax.vmap(of_member, spmd_axis_name=axis)(variables, own)
        return jax.lax.map(lambda member: of_member(*member), (variables, own))

    return count


def _cut(size: int, batch_size: int, devices: int) -> list[np.ndarray]:
    """The rows of whole batches `[n, B]`; of the rest `[1, ...]`, first as many as devices can share."""
    rows = np.arange(size, dtype=np.int32)
    whole = size // batch_size * batch_size
    shared = size - (size - whole) % devices
    parts = rows[:whole].reshape(-1, batch_size), rows[None, whole:shared], rows[None, shared:]
    return [part for part in parts if part.size]
