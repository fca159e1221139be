"""Inference with a generalist and specialists (section 5.4): `predict`, and the steps it takes.

Step 1: a specialist is active for an example if its set has one of the generalist's n most probable
classes (`active_specialists`); it alone is run, and its head is read (`run_active`). Step 2: q minimises
Eq. 5 over the generalist and the active specialists (`combine`, by a method of `eq5`). An example
without an active specialist keeps the generalist's distribution.

Class sets are int32 `[K, S]`, padded with C. A head that is read has logits `[..., S + 1]`: its set's,
in the order of the set (-inf where padded), and the dustbin's last.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax import ranges, shapes
from distill_jax.errors import UserError
from distill_jax.models import Params
from distill_jax.specialists import eq5
from distill_jax.specialists.coverage import check_class_sets
from distill_jax.specialists.store import Specialists

_TOLERANCE, _PASSES = 1e-6, 1000  # of Eq. 5's solver
BATCH_SIZE = 256  # examples that a specialist is run on at a time, and that are combined
ROWS = 4096  # examples whose specialists' logits are in memory at a time


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
        UserError: if `max_active` is more than K, n is not in 1..C, or for sets that are none.

    Examples:
        >>> import jax.numpy as jnp
        >>> logits, sets = jnp.array([[0.0, 3.0, 1.0]]), jnp.array([[0, 2], [1, 2]])
        >>> ids, active, count = active_specialists(logits, sets, max_active=2)
        >>> ids.tolist(), active.tolist(), count.tolist()
        ([[1, 0]], [[True, False]], [1])
    """
    shapes.check(
        generalist_logits=(generalist_logits, "float B C"), class_sets=(class_sets, "int K S")
    )
    num_specialists = len(class_sets)
    if max_active > num_specialists:
        raise UserError(f"max_active is {max_active}, but there are {num_specialists} specialists")
    hit, probability = _hits(generalist_logits, class_sets, n)
    relevance = jnp.where(hit, probability, -1.0)
    kept, ids = jax.lax.top_k(relevance, max_active)
    return ids, kept >= 0, jnp.sum(hit, axis=-1, dtype=jnp.int32)


def run_active(
    specialists: Specialists,
    generalist_logits: np.ndarray,
    inputs: np.ndarray,
    *,
    n: int = 1,
    batch_size: int = BATCH_SIZE,
) -> Evidence:
    """Runs each specialist on the examples that it is active on, and on no others.

    In batches of one size, filled up with rows of their own, so that one compiled program serves.

    Args:
        specialists: trained; their heads are read with their corrections.
        generalist_logits: `[N, C]`.
        inputs: `[N, ...]`, what the specialists' model takes.
        n: as for `active_specialists`.
        batch_size: rows that a specialist is run on at a time.

    Returns:
        On the host, for all N, with A the most that are active for an example. A full softmax (section
        6.1) names all C classes: then S is C, and the dustbin's logit -inf.

    Raises:
        UserError: for a class that doesn't exist, n beyond C, or counts or shapes that don't fit, naming
            them.

    Examples:
        >>> import jax, numpy as np
        >>> from distill_jax import models, nets
        >>> from distill_jax.specialists import heads, store
        >>> model = models.mlp([8], 6)  # a specialist with this head has an output for each class
        >>> init = lambda key: model.init(key, np.zeros((1, 4), np.float32))
        >>> params = jax.vmap(init)(jax.random.split(jax.random.key(0), 2))
        >>> sets, corrections = np.array([[0, 1], [3, 5]], np.int32), np.zeros(2, np.float32)
        >>> net = nets.Net(model, params, history=[], seconds=0.0, members=2, about={})
        >>> two = store.Specialists(net, heads.LOG_SUM_EXP, sets, corrections, num_classes=6)
        >>> logits = np.eye(6, dtype=np.float32)[[0, 2]]  # class 2 is in no set
        >>> evidence = run_active(two, logits, np.ones((2, 4), np.float32))
        >>> evidence.active.tolist(), evidence.specialists.shape
        ([[True], [False]], (2, 1, 3))
    """
    ranges.check(batch_size=batch_size)
    class_sets = np.asarray(specialists.class_sets)
    num_specialists, num_classes = len(class_sets), generalist_logits.shape[1]
    _check_run(specialists, generalist_logits, inputs, n)
    named = class_sets
    if not specialists.head.has_dustbin:
        named = np.tile(np.arange(num_classes, dtype=np.int32), (num_specialists, 1))
    ids, active = _active_of_all(generalist_logits, class_sets, batch_size, n)
    logits = np.zeros((*ids.shape, named.shape[1] + 1), np.float32)
    model, head = specialists.net.model, specialists.head
    for k in range(num_specialists):
        rows, places = np.nonzero(active & (ids == k))
        one = jax.tree.map(  # copied to the device once, and not with each batch
            lambda leaf, k=k: jnp.asarray(leaf[k]),
            (specialists.net.params, class_sets, np.asarray(specialists.corrections)),
        )
        for at, filled in _batches(len(rows), batch_size):
            found = read_logits(model.apply, head.read, one, inputs[rows[filled]])
            if found.shape != (batch_size, logits.shape[-1]):
                raise UserError(
                    f"a specialist with the head {head.name!r} gave logits {found.shape} for "
                    f"{batch_size} inputs; expected {(batch_size, logits.shape[-1])}"
                )
            logits[rows[at], places[at]] = found[: len(at)]
    return Evidence(generalist_logits, logits, named[ids], active)


def predict(
    specialists: Specialists,
    generalist_logits: np.ndarray,
    inputs: np.ndarray,
    *,
    n: int = 1,
    batch_size: int = BATCH_SIZE,
) -> np.ndarray:
    """The distribution q of Eq. 5, of a generalist and its specialists: section 5.4 as a whole.

    Args:
        specialists: from training, or `store.load`.
        generalist_logits: `[N, C]`.
        inputs: `[N, ...]`, what the specialists' model takes.
        n: how many of the generalist's most probable classes make a specialist active; 1 in the paper.
        batch_size: examples at a time, of a specialist and of Eq. 5.

    Returns:
        q float32 `[N, C]`, with sums 1.

    Raises:
        UserError: as `run_active`.

    Examples:
        >>> import jax, numpy as np
        >>> from distill_jax import models, nets
        >>> from distill_jax.specialists import heads, store
        >>> model = models.mlp([8], 6)  # a specialist with this head has an output for each class
        >>> init = lambda key: model.init(key, np.zeros((1, 4), np.float32))
        >>> params = jax.vmap(init)(jax.random.split(jax.random.key(0), 2))
        >>> sets, corrections = np.array([[0, 1], [3, 5]], np.int32), np.zeros(2, np.float32)
        >>> net = nets.Net(model, params, history=[], seconds=0.0, members=2, about={})
        >>> two = store.Specialists(net, heads.LOG_SUM_EXP, sets, corrections, num_classes=6)
        >>> random = np.random.default_rng(0)
        >>> logits, inputs = random.normal(size=(10, 6)), random.normal(size=(10, 4))
        >>> q = predict(two, logits.astype(np.float32), inputs.astype(np.float32))
        >>> q.shape, bool(np.allclose(q.sum(axis=1), 1))
        ((10, 6), True)
    """
    parts = []
    for start in range(0, len(inputs), ROWS):
        rows = slice(start, start + ROWS)
        evidence = run_active(
            specialists, generalist_logits[rows], inputs[rows], n=n, batch_size=batch_size
        )
        parts.append(np.asarray(combine(evidence, batch_size=batch_size)[0]))
    return np.concatenate(parts)


def predict_all(
    specialists: Specialists, generalist_logits: Array, inputs: Array, *, n: int = 1
) -> tuple[Array, Array]:
    """`predict` as one program that can be traced and exported: it runs all K on each example.

    Args:
        specialists, n: as for `predict`.
        generalist_logits: `[B, C]`.
        inputs: `[B, ...]`.

    Returns:
        active bool `[B, K]`, and q float32 `[B, C]`.

    Raises:
        UserError: for n beyond C, or sets that are none.

    Examples:
        >>> import jax, numpy as np
        >>> from distill_jax import models, nets
        >>> from distill_jax.specialists import heads, store
        >>> model = models.mlp([8], 6)  # a specialist with this head has an output for each class
        >>> init = lambda key: model.init(key, np.zeros((1, 4), np.float32))
        >>> params = jax.vmap(init)(jax.random.split(jax.random.key(0), 2))
        >>> sets, corrections = np.array([[0, 1], [3, 5]], np.int32), np.zeros(2, np.float32)
        >>> net = nets.Net(model, params, history=[], seconds=0.0, members=2, about={})
        >>> two = store.Specialists(net, heads.LOG_SUM_EXP, sets, corrections, num_classes=6)
        >>> active, q = predict_all(two, jnp.eye(6)[:2] * 5, jnp.ones((2, 4)))
        >>> active.tolist(), q.shape
        ([[True, False], [True, False]], (2, 6))
    """
    num_specialists, num_classes = len(specialists.class_sets), generalist_logits.shape[1]
    sets = jnp.asarray(specialists.class_sets)
    active, _ = _hits(generalist_logits, sets, n)
    head, apply = specialists.head, specialists.net.model.apply

    def run(params: Params, class_set: Array, correction: Array) -> Array:
        return head.read(apply(params, inputs), class_set, correction)

    own = (specialists.net.params, sets, jnp.asarray(specialists.corrections))
    logits = jax.vmap(run, out_axes=1)(*jax.tree.map(jnp.asarray, own))
    named = sets
    if not head.has_dustbin:
        every = jnp.arange(num_classes, dtype=jnp.int32)
        named = jnp.broadcast_to(every, (num_specialists, num_classes))

    def one(generalist: Array, specialists: Array, active: Array) -> Array:
        problem = eq5.pose(generalist, specialists, named, active)
        return eq5.solve(problem, eq5.newton(), jnp.float32(_TOLERANCE), jnp.int32(_PASSES))[0]

    return active, jax.vmap(one)(generalist_logits, logits, active)


def combine(
    evidence: Evidence,
    method: eq5.Method | None = None,
    tolerance: ArrayLike = _TOLERANCE,
    max_passes: ArrayLike = _PASSES,
    batch_size: int = BATCH_SIZE,
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
        UserError: for shapes that don't fit together, naming them; for an active specialist's class
            that doesn't exist or occurs twice.

    Examples:
        >>> import numpy as np
        >>> generalist, sets = np.zeros((1, 4), np.float32), np.array([[[0, 1]]])
        >>> specialist, active = np.array([[[2.0, 0.0, 0.0]]], np.float32), np.array([[True]])
        >>> q, passes = combine(Evidence(generalist, specialist, sets, active))
        >>> q.argmax().item(), round(float(q.sum()), 4)
        (0, 1.0)
    """
    _check_shapes(evidence)
    ranges.check(batch_size=batch_size)
    ranges.check_value("tolerance", tolerance, ranges.any_number())
    ranges.check_value("max_passes", max_passes, ranges.any_number())
    num_classes, active = evidence.generalist.shape[1], evidence.active[..., None]
    check_class_sets(jnp.where(active, evidence.class_sets, num_classes), num_classes)
    return combine_batches(method or eq5.newton(), batch_size, evidence, tolerance, max_passes)


@functools.partial(jax.jit, static_argnames=("method", "batch_size"))
def combine_batches(
    method: eq5.Method,
    batch_size: int,
    evidence: Evidence,
    tolerance: ArrayLike,
    max_passes: ArrayLike,
) -> tuple[Array, Array]:
    """The program of `combine`, with its arguments, which checks nothing.

    Examples:
        >>> evidence = Evidence(
        ...     jnp.zeros((1, 4)), jnp.zeros((1, 1, 3)), jnp.zeros((1, 1, 2), int), jnp.array([[False]])
        ... )
        >>> combine_batches(eq5.newton(), 256, evidence, 1e-6, 1000)[0].tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """

    def one(arrays: tuple[Array, ...]) -> tuple[Array, Array]:
        until = jnp.asarray(tolerance), jnp.asarray(max_passes)
        return eq5.solve(eq5.pose(*arrays), method, *until)

    return jax.lax.map(one, tuple(evidence), batch_size=batch_size)


@functools.partial(jax.jit, static_argnames=("apply", "read"))
def read_logits(
    apply: Callable[..., Array],
    read: Callable[[Array, Array, ArrayLike], Array],
    one: tuple[Params, Array, Array],
    inputs: Array,
) -> Array:
    """One specialist's corrected logits `[B, S + 1]`, as a program.

    Args:
        apply: its model's.
        read: its head's.
        one: its parameters, class set `[S]` and correction.
        inputs: `[B, ...]`.

    Examples:
        >>> from distill_jax.specialists import heads
        >>> one = {}, jnp.array([1]), jnp.float32(2.0)
        >>> read_logits(lambda params, x: x, heads.UNIT.read, one, jnp.zeros((1, 2))).tolist()
        [[0.0, 2.0]]
    """
    params, class_set, correction = one
    return read(apply(params, inputs), class_set, correction)


def _hits(generalist_logits: Array, class_sets: Array, n: int) -> tuple[Array, Array]:
    """Which specialists are active, bool `[B, K]`, and the probability that each one's set has."""
    num_specialists, num_classes = len(class_sets), generalist_logits.shape[1]
    _check_n(n, num_classes)
    check_class_sets(class_sets, num_classes)
    p = jax.nn.softmax(generalist_logits.astype(jnp.float32))
    rows = jnp.arange(num_specialists)[:, None]
    members = jnp.zeros((num_specialists, num_classes), bool)
    members = members.at[rows, class_sets].set(True, mode="drop")
    top = jax.lax.top_k(p, n)[1]
    return jnp.any(members[:, top], axis=-1).T, p @ members.T.astype(jnp.float32)


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


def _check_run(
    specialists: Specialists, generalist_logits: np.ndarray, inputs: np.ndarray, n: int
) -> None:
    num_classes, count = generalist_logits.shape[1], len(specialists.class_sets)
    check_class_sets(np.asarray(specialists.class_sets), num_classes)
    _check_n(n, num_classes)
    leading = {leaf.shape[0] for leaf in jax.tree.leaves(specialists.net.params)}
    if leading != {count}:
        raise UserError(
            f"params have leading axes {sorted(leading)} for {count} class sets; expected {count} "
            "specialists in every leaf"
        )
    if not len(inputs) or len(inputs) != len(generalist_logits):
        raise UserError(f"{len(inputs)} inputs for {len(generalist_logits)} rows of logits")


def _check_n(n: int, num_classes: int) -> None:
    if not 0 < n <= num_classes:
        raise UserError(f"n is {n}; expected 1 to {num_classes} classes")


def _check_shapes(evidence: Evidence) -> None:
    sizes = shapes.check(
        generalist=(evidence.generalist, "float B C"),
        class_sets=(evidence.class_sets, "int B A? S"),
        active=(evidence.active, "bool B A?"),
    )
    outputs = f"{sizes['B']} {sizes['A']} {sizes['S'] + 1}"
    shapes.check(specialists=(evidence.specialists, f"float {outputs}"))
