r"""What a specialist is trained on, and what its outputs then mean: sections 5.2 and 6.1 of the paper.

A specialist of S classes tells them apart and puts all others in a dustbin, its class S. It starts as
the generalist and sees batches of which half are examples of its classes. For K specialists at a time
every function here is vmapped over sets int32 `[K, S]`; a smaller set is padded with C at its end.

The dustbin has two forms. It is a unit of its own, which `reduce_output` starts; the paper's "one
logit". Or the generalist's output layer is kept whole, and the dustbin's logit is the log-sum-exp of
all logits that it stands for (`collapse`, `collapsed_loss`). Such a specialist starts as exactly the
generalist; one unit can't be the log-sum-exp of many, least of all above few hidden units.

The correction. Let pi be the share of special examples in the training set. Batches have the priors
1/2 and 1/2 in place of pi and 1 - pi, and inside either half the classes keep their proportions. By
Bayes' rule a posterior changes with the priors as `p(y|x) ~ p'(y|x) P(y) / P'(y)`: the dustbin's odds
against the special classes change by

    [(1 - pi) / (1/2)] / [pi / (1/2)] = (1 - pi) / pi,

and its logit by the logarithm of that: "the log of the proportion by which the specialist class is
oversampled" (section 5.2), which is `(1/2 / pi) / (1/2 / (1 - pi))`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax import losses
from distill_jax.errors import UserError
from distill_jax.models import Params
from distill_jax.specialists.clustering import pad_sets
from distill_jax.train_step import Batch, Constants, Hyper


def dustbin_labels(class_set: Array, num_classes: int) -> Array:
    """The specialist's label for each of the generalist's classes.

    Args:
        class_set: int32 `[S]`, padded with C.
        num_classes: C.

    Returns:
        int32 `[C]`: a class's place in the set, or S, the dustbin, if it is not there.
    """
    size = len(class_set)
    labels = jnp.full(num_classes, size, jnp.int32)
    return labels.at[class_set].set(jnp.arange(size, dtype=jnp.int32), mode="drop")


def to_dustbin(batch: Batch, targets: Array) -> Batch:
    """A batch with the specialist's labels: `targets` `[C]` from `dustbin_labels`; -1 stays -1."""
    label = batch["label"]
    return {**batch, "label": jnp.where(label >= 0, targets[label], label)}


def enriched_rows(
    labels: np.ndarray, class_set: ArrayLike, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the two halves of a specialist's batches are drawn from.

    Args:
        labels: int `[N]`; a row of label -1, unknown, is in neither half.
        class_set: int `[S]`, padded with C.
        num_classes: C.

    Returns:
        Rows int32 of the special classes' examples and of all others.

    Raises:
        UserError: naming a class of the set without any example, or if no example is left for the
            dustbin.
    """
    labels, class_set = np.asarray(labels), np.asarray(class_set)
    missing = np.setdiff1d(class_set[class_set < num_classes], labels)
    if len(missing):
        raise UserError(
            f"class {missing[0]} of a specialist's set has no example ({len(missing)} of "
            f"{np.count_nonzero(class_set < num_classes)} classes have none)"
        )
    special = np.isin(labels, class_set)
    other = ~special & (labels >= 0)
    if not other.any():
        raise UserError(
            f"a dustbin of no mass: all {len(labels)} examples are of the specialist's classes, "
            f"{class_set[:5].tolist()} and so on; a set must leave out a class with examples"
        )
    return np.flatnonzero(special).astype(np.int32), np.flatnonzero(other).astype(np.int32)


def stack_rows(rows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """The rows of K specialists (`enriched_rows`) as arrays with a leading axis, for `draw_enriched`.

    Returns:
        "special" int32 `[K, n]` and "other" int32 `[K, m]`, padded with -1 at their end, and the real
        numbers of rows "special_count" and "other_count", int32 `[K]`.
    """
    stacked = {}
    for name, parts in zip(("special", "other"), zip(*rows, strict=True), strict=True):
        stacked[name] = pad_sets(parts, -1)
        stacked[f"{name}_count"] = np.array([len(part) for part in parts], np.int32)
    return stacked


def draw_enriched(examples: Mapping[str, Array], key: Array, steps: int, batch_size: int) -> Array:
    """The rows of enriched batches: half special, half others, each drawn uniformly with replacement.

    Even places are special and odd ones are not, so that a batch cut into equal parts over devices is
    half and half in each part of even size.

    Args:
        examples: one specialist's fields of `stack_rows` (`[n]`, `[m]`, `[]`, `[]`).
        key: of the draw.
        steps: batches; static.
        batch_size: B, even; static.

    Returns:
        int32 `[steps, B]`.

    Raises:
        UserError: for an odd batch size.
    """
    if batch_size % 2:
        raise UserError(f"batch_size of a specialist must be even to halve it, not {batch_size}")

    def draw(name: str, key: Array) -> Array:
        count = examples[f"{name}_count"]
        return examples[name][jax.random.randint(key, (steps, batch_size // 2), 0, count)]

    special_key, other_key = jax.random.split(key)
    halves = [draw("special", special_key), draw("other", other_key)]
    return jnp.stack(halves, axis=-1).reshape(steps, batch_size)


def dustbin_correction(num_special: ArrayLike, num_other: ArrayLike) -> Array:
    """What the dustbin's logit is incremented by after training: `log((1 - pi) / pi)`, see above.

    Args:
        num_special: examples of the special classes in the training set, above 0; `[]` or `[K]`.
        num_other: all others, above 0; of the same shape.

    Returns:
        float32 of that shape, in nats; negative where special examples are the majority.
    """
    return jnp.log(jnp.asarray(num_other, jnp.float32) / jnp.asarray(num_special, jnp.float32))


def correct_dustbin(logits: Array, correction: ArrayLike) -> Array:
    """Logits `[..., S + 1]` of a specialist with the dustbin's, the last, corrected: float32."""
    return logits.astype(jnp.float32).at[..., -1].add(correction)


def correct_others(logits: Array, class_set: Array, correction: ArrayLike) -> Array:
    """The same for a specialist with a full softmax (section 6.1): all other classes are corrected.

    Args:
        logits: `[..., C]`.
        class_set: int32 `[S]`, padded with C.
        correction: scalar, from `dustbin_correction`.

    Returns:
        float32 `[..., C]`.
    """
    outside = jnp.broadcast_to(_outside(class_set, logits.shape[-1]), logits.shape)
    return logits.astype(jnp.float32) + jnp.where(outside, correction, 0.0)


def reduce_output(params: Params, class_set: Array, num_classes: int) -> Params:
    """The generalist's parameters with its output layer cut down to S classes and a dustbin.

    The special classes keep their logits. The dustbin's should be the log-sum-exp of the n logits that
    it stands for, which is no linear layer; it starts as their mean plus log n. That is the
    log-sum-exp's first-order expansion about equal logits: exact there, and nowhere more.

    The place of a padded class has a bias of -inf, so never any probability nor gradient. Such biases
    can't be decayed.

    Args:
        params: of a network with {"output": {"kernel": `[D, C]`, "bias": `[C]`}}; all else is kept.
        class_set: int32 `[S]`, padded with C. Without any class outside it the dustbin is -inf too.
        num_classes: C.

    Returns:
        Parameters with {"output": {"kernel": `[D, S + 1]`, "bias": `[S + 1]`}}.

    Raises:
        UserError: if the output layer has another number of classes.
    """
    kernel, bias = params["output"]["kernel"], params["output"]["bias"]
    if kernel.shape[-1:] != (num_classes,) or bias.shape != (num_classes,):
        raise UserError(
            f"the generalist's output has kernel {kernel.shape} and bias {bias.shape}; expected "
            f"[D, {num_classes}] and [{num_classes}]"
        )
    outside = _outside(class_set, num_classes)
    count = jnp.sum(outside, dtype=bias.dtype)
    shares = outside.astype(bias.dtype) / jnp.maximum(count, 1)
    dustbin_kernel = jnp.matmul(kernel, shares, precision="highest")
    dustbin_bias = jnp.dot(bias, shares, precision="highest") + jnp.log(count)
    special_kernel = jnp.take(kernel, class_set, axis=1, mode="fill", fill_value=0.0)
    special_bias = jnp.take(bias, class_set, mode="fill", fill_value=-jnp.inf)
    output = {
        "kernel": jnp.concatenate([special_kernel, dustbin_kernel[:, None]], axis=1),
        "bias": jnp.append(special_bias, dustbin_bias),
    }
    return {**params, "output": output}


def collapse(logits: Array, class_set: Array) -> Array:
    """Logits of all classes as those of a set and a dustbin: probabilities outside are summed.

    Args:
        logits: `[..., C]`.
        class_set: int32 `[S]`, padded with C.

    Returns:
        float32 `[..., S + 1]`: the set's, in its order (-inf where padded), and last the log-sum-exp
        of all others (-inf if there are none).
    """
    logits = logits.astype(jnp.float32)
    special = jnp.take(logits, class_set, axis=-1, mode="fill", fill_value=-jnp.inf)
    outside = jnp.broadcast_to(_outside(class_set, logits.shape[-1]), logits.shape)
    # Masked before the sum, and also where it is -inf, so that no gradient is NaN if all of it is.
    others = jnp.where(outside & (logits > -jnp.inf), logits, -jnp.inf)
    dustbin = jax.nn.logsumexp(others, axis=-1)
    return jnp.concatenate([special, dustbin[..., None]], axis=-1)


def collapsed_loss(logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None) -> Array:
    """Cross-entropy of collapsed logits with the specialist's label (`dustbin_labels`).

    With lse the log-sum-exp, `lse(z) - z_y` for an example of a special class y, and
    `lse(z) - lse(z outside the set)` for any other.

    Args:
        logits: `[B, C]` of the specialist.
        batch: with "label" int32 `[B]`, of the generalist's classes, all known, and "class_set" int32
            `[B, S]`, padded with C, the same for every example (rows, so that a batch can be cut).
        hyper: not read.

    Returns:
        `[B]` float32, in nats.

    Raises:
        UserError: naming fields that the batch lacks.
    """
    _check_fields(
        batch,
        ("label", "class_set"),
        "a collapsed specialist needs the generalist's labels, and the set of its own classes",
    )
    class_set = batch["class_set"][0]
    targets = dustbin_labels(class_set, logits.shape[-1])
    collapsed = collapse(logits, class_set)
    return losses.hard_cross_entropy(collapsed, targets[batch["label"]])


def full_softmax_loss(
    logits: Array, batch: Batch, hyper: Hyper, constants: Constants = None
) -> Array:
    """Hard targets for special classes, the generalist's soft targets for all others (section 6.1).

    For specialists with a full softmax, which so keep what the generalist knows of the other classes.
    The soft targets are at `hyper["temperature"]`, and their cross-entropy is times its square.

    Args:
        logits: `[B, C]` of the specialist.
        batch: with "label" int32 `[B]`, "is_special" bool `[B]` and "teacher_logits" `[B, C]`, the
            generalist's.
        hyper: with "temperature".

    Returns:
        `[B]` float32, in nats.

    Raises:
        UserError: naming fields that the batch lacks.
    """
    _check_fields(
        batch,
        ("is_special", "teacher_logits"),
        "a specialist with a full softmax needs to know which examples are special, and the "
        "generalist's logits",
    )
    special, temperature = batch["is_special"], hyper["temperature"]
    hard = losses.hard_cross_entropy(logits, jnp.where(special, batch["label"], 0))
    targets = losses.softmax(batch["teacher_logits"], temperature)
    return jnp.where(special, hard, losses.soft_cross_entropy(logits, targets, temperature))


def _outside(class_set: Array, num_classes: int) -> Array:
    """The classes that are not in a set: bool `[C]`."""
    return jnp.ones(num_classes, bool).at[class_set].set(False, mode="drop")


def _check_fields(batch: Batch, names: tuple[str, ...], reason: str) -> None:
    missing = [name for name in names if name not in batch]
    if missing:
        raise UserError(
            f"the batch has no {' and no '.join(missing)}, only {sorted(batch)}: {reason}"
        )
