"""Inference with a generalist and specialists (section 5.4): who is active, and what q they make.

Step 1: a specialist is active for an example if its set has one of the generalist's n most probable
classes. Step 2: q minimises Eq. 5 over the generalist and the active specialists; `solvers` tells how.
An example without an active specialist keeps the generalist's distribution.

Class sets are int32 `[K, S]`, padded with C. A specialist's logits are `[..., S + 1]`: its set's, in
the order of the set (-inf where padded), and the dustbin's last.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax.errors import UserError
from distill_jax.models import Params
from distill_jax.specialists import eq5


class Evidence(NamedTuple):
    """What Eq. 5 is made of, for a batch; arrays of JAX or NumPy.

    generalist: logits `[B, C]`. specialists: logits `[B, A, S + 1]` of the active ones, the dustbin's
    last. class_sets: int32 `[B, A, S]`, C where padded. active: bool `[B, A]`, false where padded;
    the rest of such an entry is ignored.
    """

    generalist: Array | np.ndarray
    specialists: Array | np.ndarray
    class_sets: Array | np.ndarray
    active: Array | np.ndarray


def active_specialists(
    generalist_logits: Array, class_sets: Array, max_active: int, n: int = 1
) -> tuple[Array, Array, Array]:
    """The specialists to run for each example, the most relevant first.

    Relevant is a specialist by the probability that the generalist gives its set.

    Args:
        generalist_logits: `[B, C]`.
        class_sets: int32 `[K, S]`, padded with C.
        max_active: A, at most K.
        n: how many of the generalist's most probable classes make a specialist active.

    Returns:
        ids int32 `[B, A]`, active bool `[B, A]`, and count int32 `[B]` of all that are active: where it
        is above A, the least relevant are left out.

    Raises:
        UserError: if `max_active` is more than K.
    """
    num_specialists, num_classes = len(class_sets), generalist_logits.shape[1]
    if max_active > num_specialists:
        raise UserError(f"max_active is {max_active}, but there are {num_specialists} specialists")
    p = jax.nn.softmax(generalist_logits.astype(jnp.float32))
    rows = jnp.arange(num_specialists)[:, None]
    members = jnp.zeros((num_specialists, num_classes), bool)
    members = members.at[rows, class_sets].set(True, mode="drop")
    top = jax.lax.top_k(p, n)[1]
    hit = jnp.any(members[:, top], axis=-1).T
    relevance = jnp.where(hit, p @ members.T.astype(jnp.float32), -1.0)
    kept, ids = jax.lax.top_k(relevance, max_active)
    return ids, kept >= 0, jnp.sum(hit, axis=-1, dtype=jnp.int32)


def gather_active(
    generalist_logits: Array,
    specialist_logits: Array,
    class_sets: Array,
    ids: Array,
    active: Array,
) -> Evidence:
    """Evidence from the logits of all specialists, where all were run.

    Args:
        generalist_logits: `[B, C]`.
        specialist_logits: `[K, B, S + 1]`.
        class_sets: int32 `[K, S]`.
        ids: int32 `[B, A]` from `active_specialists`.
        active: bool `[B, A]` from there.
    """
    chosen = specialist_logits[ids, jnp.arange(len(ids))[:, None]]
    return Evidence(generalist_logits, chosen, class_sets[ids], active)


def run_active(
    apply: Callable[[Params, Array], Array],
    params: Params,
    class_sets: np.ndarray,
    generalist_logits: np.ndarray,
    inputs: np.ndarray,
    batch_size: int = 256,
    n: int = 1,
    outputs: np.ndarray | None = None,
) -> Evidence:
    """Runs each specialist on the examples that it is active on, and on no others.

    In batches of one size, filled up with rows of their own, so that one compiled program serves.

    Args:
        apply: `(params of one, inputs [batch_size, ...]) -> logits [batch_size, S + 1]`.
        params: of all specialists, each leaf `[K, ...]`.
        class_sets: int32 `[K, S]`, padded with C; who is active goes by these.
        generalist_logits: `[N, C]`.
        inputs: `[N, ...]`.
        batch_size: rows given to `apply` at a time.
        n: as for `active_specialists`.
        outputs: int32 `[K, S']`, padded with C, the classes that the logits `[batch_size, S' + 1]` name
            where these are not the sets'. A full softmax (section 6.1) names all C, and has a dustbin
            of -inf.

    Returns:
        On the host, for all N, with A the most that are active for an example; its class sets are
        `outputs` where given.

    Raises:
        UserError: for a class that doesn't exist, or counts or shapes that don't fit, naming them.
    """
    outputs = class_sets if outputs is None else outputs
    num_specialists, size = outputs.shape
    _check_run(params, class_sets, outputs, generalist_logits, inputs)
    ids, active = _active_of_all(generalist_logits, class_sets, batch_size, n)
    run = jax.jit(apply)
    specialists = np.zeros((*ids.shape, size + 1), np.float32)
    for k in range(num_specialists):
        rows, places = np.nonzero(active & (ids == k))
        own = jax.tree.map(lambda leaf, k=k: leaf[k], params)
        for at, filled in _batches(len(rows), batch_size):
            logits = run(own, inputs[rows[filled]])
            if logits.shape != (batch_size, size + 1):
                raise UserError(
                    f"a specialist gave logits {logits.shape} for {batch_size} inputs and a set of "
                    f"{size} classes; expected {(batch_size, size + 1)}"
                )
            specialists[rows[at], places[at]] = logits[: len(at)]
    return Evidence(generalist_logits, specialists, outputs[ids], active)


def combine(
    evidence: Evidence,
    method: eq5.Method | None = None,
    tolerance: ArrayLike = 1e-6,
    max_passes: ArrayLike = 1000,
    batch_size: int = 256,
) -> tuple[Array, Array]:
    """The distribution q that minimises Eq. 5, for each example.

    Args:
        evidence: of B examples.
        method: `eq5.newton()`, the default, `eq5.fixed_point()` or `eq5.descent(...)`, each
            forward, KL(p, q), or reverse, KL(q, p).
        tolerance: an example is done at this residual, in units of probability. Newton's q is then
            within about 1e-6 of the minimum; the others' are where their last passes changed little.
        max_passes: an example is done then, too.
        batch_size: examples in memory at a time; they wait for their slowest.

    Returns:
        q float32 `[B, C]` with sums 1, and int32 `[B]`, the passes that each took.

    Raises:
        UserError: for shapes that don't fit together, naming them.
    """
    _check_shapes(evidence)
    return _combine(evidence, tolerance, max_passes, method or eq5.newton(), batch_size)


_choose = jax.jit(active_specialists, static_argnames=("max_active", "n"))


def _active_of_all(
    generalist_logits: np.ndarray, class_sets: np.ndarray, batch_size: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """ids and active `[N, A]`, on the host, with A the most that are active for an example."""
    parts = []
    for at, filled in _batches(len(generalist_logits), batch_size):
        found = _choose(generalist_logits[filled], class_sets, max_active=len(class_sets), n=n)
        parts.append([np.asarray(field)[: len(at)] for field in found])
    ids, active, count = (np.concatenate(fields) for fields in zip(*parts, strict=True))
    width = max(1, count.max())
    return ids[:, :width], active[:, :width]


def _batches(size: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers below `size` in turn, and the same filled up to `batch_size` by repetition."""
    for start in range(0, size, batch_size):
        part = np.arange(start, min(start + batch_size, size))
        yield part, np.resize(part, batch_size)


@functools.partial(jax.jit, static_argnames=("method", "batch_size"))
def _combine(
    evidence: Evidence,
    tolerance: Array,
    max_passes: Array,
    method: eq5.Method,
    batch_size: int,
) -> tuple[Array, Array]:
    def one(arrays: tuple[Array, ...]) -> tuple[Array, Array]:
        return eq5.solve(eq5.pose(*arrays), method, tolerance, max_passes)

    return jax.lax.map(one, tuple(evidence), batch_size=batch_size)


def check_class_sets(class_sets: np.ndarray, num_classes: int, name: str = "class_sets") -> None:
    """Raises UserError with that name unless all classes are in 0..C, C being padding."""
    wrong = class_sets[(class_sets < 0) | (class_sets > num_classes)]
    if len(wrong):
        raise UserError(
            f"{name} name class {wrong[0]}; there are {num_classes}, so expected 0 to "
            f"{num_classes - 1}, or {num_classes} for padding"
        )


def _check_run(
    params: Params,
    class_sets: np.ndarray,
    outputs: np.ndarray,
    generalist_logits: np.ndarray,
    inputs: np.ndarray,
) -> None:
    check_class_sets(class_sets, generalist_logits.shape[1])
    check_class_sets(outputs, generalist_logits.shape[1], "outputs")
    if len(outputs) != len(class_sets):
        raise UserError(
            f"outputs are of {len(outputs)} specialists, class_sets of {len(class_sets)}"
        )
    leading = {leaf.shape[0] for leaf in jax.tree.leaves(params)}
    if leading != {len(class_sets)}:
        raise UserError(
            f"params have leading axes {sorted(leading)} for {len(class_sets)} class sets; expected "
            f"{len(class_sets)} specialists in every leaf"
        )
    if not len(inputs) or len(inputs) != len(generalist_logits):
        raise UserError(f"{len(inputs)} inputs for {len(generalist_logits)} rows of logits")


def _check_shapes(evidence: Evidence) -> None:
    generalist, specialists, class_sets, active = (x.shape for x in evidence)
    size, width, special = class_sets if len(class_sets) == 3 else (-1, -1, -1)
    fitting = specialists == (size, width, special + 1) and active == (size, width)
    if not fitting or generalist[:1] != (size,) or len(generalist) != 2:
        raise UserError(
            f"evidence has generalist {generalist}, specialists {specialists}, class_sets {class_sets} "
            f"and active {active}; expected [B, C], [B, A, S + 1], [B, A, S] and [B, A]"
        )
