r"""The examples that a specialist is trained on, and the correction for them (section 5.2 of the paper).

Half of each batch are examples of the specialist's special classes, the other half are drawn from the
rest of the training set. For K specialists every function here is vmapped over sets int32 `[K, S]`; a
smaller set is padded with C at its end.

The correction. Let pi be the share of special examples in the training set. Batches have the priors
1/2 and 1/2 in place of pi and 1 - pi, and inside either half the classes keep their proportions. By
Bayes' rule a posterior changes with the priors as `p(y|x) ~ p'(y|x) P(y) / P'(y)`: the dustbin's odds
against the special classes change by

    [(1 - pi) / (1/2)] / [pi / (1/2)] = (1 - pi) / pi,

and its logit by the logarithm of that: "the log of the proportion by which the specialist class is
oversampled" (section 5.2), which is `(1/2 / pi) / (1/2 / (1 - pi))`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax import ranges, shapes, trainer
from distill_jax.batches import check_rows, rows_of
from distill_jax.errors import UserError
from distill_jax.models import Params
from distill_jax.specialists.clustering import pad_sets
from distill_jax.specialists.coverage import check_class_sets
from distill_jax.specialists.heads import Head
from distill_jax.train_checks import check_labels


class Enriched(NamedTuple):
    """What K specialists of a generalist are trained on, for `trainer.train`.

    examples: of each, "inputs" `[N, ...]` and "label" `[N]` with its own rows (`draw_enriched`).
    constants: of each, for the losses of heads. corrections: float32 `[K]`, of their dustbins.
    """

    examples: list[dict[str, Any]]
    constants: list[dict[str, Any]]
    corrections: np.ndarray


def enrich(
    examples: Mapping[str, np.ndarray],
    class_sets: np.ndarray,
    num_classes: int,
    *,
    head: Head,
    generalist: Params,
) -> Enriched:
    """What the specialists of some class sets are trained on, with `READER`.

    Args:
        examples: the training set, "inputs" `[N, ...]` and "label" int `[N]`, -1 where unknown.
        class_sets: int32 `[K, S]`, padded with C.
        num_classes: C.
        head: of all specialists.
        generalist: its parameters, for a head that has it as teacher.

    Raises:
        UserError: as `enriched_rows`, or for another number of inputs than labels.

    Examples:
        >>> import numpy as np
        >>> from distill_jax.specialists import heads
        >>> examples = {"inputs": np.zeros((4, 8)), "label": np.array([0, 1, 2, 1])}
        >>> sets = np.array([[0], [1]], np.int32)
        >>> found = enrich(examples, sets, 3, head=heads.UNIT, generalist={})
        >>> found.examples[1]["label"].tolist(), float(found.corrections[1])
        ([1, 0, 1, 0], 0.0)
    """
    labels = examples["label"]
    check_rows({"inputs": examples["inputs"]}, len(labels), "labels are of")
    fields = stack_rows([enriched_rows(labels, one, num_classes) for one in class_sets])
    own = [
        {
            "inputs": examples["inputs"],
            "label": np.asarray(
                head.labels(jnp.asarray(labels), jnp.asarray(class_set), num_classes)
            ),
            **{name: field[k] for name, field in fields.items()},
        }
        for k, class_set in enumerate(class_sets)
    ]
    constants = [{"class_set": class_set, "teacher": generalist} for class_set in class_sets]
    corrections = dustbin_correction(fields["special_count"], fields["other_count"])
    return Enriched(own, constants, np.asarray(corrections))


def enriched_rows(
    labels: np.ndarray, class_set: ArrayLike, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that the two halves of a specialist's batches are drawn from.

    Args:
        labels: int `[N]`; a row of label -1, unknown, is in neither half.
        class_set: int `[S]`, of distinct classes, padded with C.
        num_classes: C.

    Returns:
        Rows int32 of the special classes' examples and of all others.

    Raises:
        UserError: naming a class of the set without any example, or that occurs twice or doesn't exist,
            or a label that doesn't; if no example is left for the dustbin.

    Examples:
        >>> import numpy as np
        >>> special, other = enriched_rows(np.array([0, 1, 2, 1, -1]), [1, 2], num_classes=3)
        >>> special.tolist(), other.tolist()
        ([1, 2, 3], [0])
    """
    labels, class_set = np.asarray(labels), np.asarray(class_set)
    shapes.check(labels=(labels, "int N"), class_set=(class_set, "int S"))
    check_class_sets(class_set, num_classes)
    check_labels([{"label": labels}], num_classes, "a specialist's examples")
    missing = np.setdiff1d(class_set[class_set < num_classes], labels)
    if len(missing):
        raise UserError(
            f"class {missing[0]} of a specialist's set has no example ({len(missing)} of "
            f"{np.count_nonzero(class_set < num_classes)} classes have none)"
        )
    special = np.isin(labels, class_set)
    if not special.any():
        raise UserError(f"a specialist's set {class_set[:5].tolist()} has no class, only padding")
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

    Examples:
        >>> import numpy as np
        >>> labels = np.array([0, 1, 2, 1])
        >>> fields = stack_rows([enriched_rows(labels, [c], 3) for c in (0, 1)])
        >>> fields["special"].tolist(), fields["special_count"].tolist()
        ([[0, -1], [1, 3]], [1, 2])
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

    Examples:
        >>> import jax, numpy as np
        >>> fields = stack_rows([enriched_rows(np.array([0, 1, 2, 1]), [1], 3)])
        >>> one = jax.tree.map(lambda field: jax.numpy.asarray(field[0]), fields)
        >>> draw_enriched(one, jax.random.key(0), steps=3, batch_size=4).shape
        (3, 4)
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
    """What is added to the dustbin's logit after training: `log((1 - pi) / pi)`, see above.

    Args:
        num_special: examples of the special classes in the training set, above 0; `[]` or `[K]`.
        num_other: all others, above 0; of the same shape.

    Returns:
        float32 of that shape, in nats; negative where special examples are the majority.

    Raises:
        UserError: for a number that isn't above 0.

    Examples:
        >>> float(dustbin_correction(50, 50))
        0.0
    """
    ranges.check_value("num_special", num_special, ranges.above(0))
    ranges.check_value("num_other", num_other, ranges.above(0))
    return jnp.log(jnp.asarray(num_other, jnp.float32) / jnp.asarray(num_special, jnp.float32))


def _take_rows(examples: Mapping[str, Array], rows: Array) -> dict[str, Array]:
    return {name: rows_of(examples[name], rows) for name in ("inputs", "label")}


READER = trainer.PLAIN._replace(
    gather=_take_rows, draw=draw_enriched, size=lambda fields: 2 * fields["special"].shape[-1]
)
"""How `trainer.train` reads `Enriched.examples`; an epoch is one pass over the special ones."""
