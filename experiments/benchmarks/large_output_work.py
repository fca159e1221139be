"""The work that `large_output` measures, the same in every framework, and its ratios."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from distill_jax.errors import UserError

TEMPERATURE, HARD_WEIGHT = 2.0, 0.5
TARGETS = ("teacher", "stored", "soft_only")
KEPT = 64  # of the soft targets that come from a store
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # relative; float32 is TF32 on a GPU

Figures = dict[str, float]
"""Of one way: "seconds", "peak_bytes", "temporary_bytes" and so on, if they can be measured."""


class Shape(NamedTuple):
    """B examples, D activations of the last hidden layer, C classes."""

    batch: int
    hidden: int
    classes: int


class Case(NamedTuple):
    """One thing to measure.

    way: fused, dense, pytorch_eager, pytorch_compile, liger_chunked or liger_jsd. targets: teacher (a
    frozen one's activations and output layer), stored (the 64 largest probabilities and the sum of
    the others), or soft_only: as teacher, but without labels and biases. shape: as a `Shape` is
    written. dtype: of activations and weights. rows: of a chunk of the fused way; 0: its own choice.
    """

    way: str
    targets: str
    shape: str
    dtype: str
    rows: int = 0

    @property
    def framework(self) -> str:
        """The worker that measures it."""
        return "jax" if self.way in ("fused", "dense") else "torch"

    @property
    def name(self) -> str:
        """The way, with its chunk where that isn't its own choice."""
        return f"{self.way}_{self.rows}" if self.rows else self.way


class Work(NamedTuple):
    """The inputs of the forward and backward pass.

    hidden, teacher_hidden: `[B, D]`; kernel, teacher_kernel: `[D, C]`; bias, teacher_bias: `[C]`;
    label: int32 `[B]`; ids: int32 `[B, 64]`; probabilities: `[B, 64]`; tail: `[B]`.
    """

    hidden: Any
    kernel: Any
    bias: Any
    teacher_hidden: Any
    teacher_kernel: Any
    teacher_bias: Any
    label: Any
    ids: Any
    probabilities: Any
    tail: Any


class Gradients(NamedTuple):
    """The mean loss, and its gradients as float32 in NumPy, shaped as in a `Work`.

    bias: None from a way that has none.
    """

    loss: float
    hidden: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray | None = None


def parse_shape(text: str) -> Shape:
    """A shape written as BxDxC, such as 1024x512x14000; else a UserError."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise UserError(
            f"--shapes has {text!r}; expected examples x activations x classes: 1024x512x14000"
        )
    shape = Shape(*map(int, text.split("x")))
    if shape.classes < KEPT:
        raise UserError(f"--shapes has {text!r}; stored targets take at least {KEPT} classes")
    return shape


def flops(case: Case) -> int:
    """Of the matrix products that every way needs: three of the student's layer, one of a teacher's."""
    products = 3 if case.targets == "stored" else 4
    batch, hidden, classes = parse_shape(case.shape)
    return 2 * products * batch * hidden * classes


def hard_weight(case: Case) -> float:
    """The weight of the labels in the objective."""
    return 0.0 if case.targets == "soft_only" else HARD_WEIGHT


def draw(case: Case) -> Work:
    """Random work in NumPy, the same for all frameworks; logits have a deviation of about 3."""
    random = np.random.default_rng(0)
    batch, hidden, classes = parse_shape(case.shape)

    def normal(*sizes: int, scale: float = 1.0) -> np.ndarray:
        return random.standard_normal(sizes, np.float32) * np.float32(scale)

    def side() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        bias = normal(classes, scale=float(case.targets != "soft_only"))
        return normal(batch, hidden), normal(hidden, classes, scale=3 / hidden**0.5), bias

    share = classes // KEPT  # one class of each such part, so that an example's are distinct
    ids = share * np.arange(KEPT) + random.integers(0, share, (batch, KEPT))
    probabilities = random.dirichlet(np.ones(KEPT + 1), batch).astype(np.float32)
    labels = random.integers(0, classes, batch).astype(np.int32)
    stored = ids.astype(np.int32), probabilities[:, :KEPT], probabilities[:, KEPT]
    return Work(*side(), *side(), labels, *stored)


def check_agreement(
    case: Case, values: Mapping[str, float], reference: Mapping[str, float]
) -> None:
    """Raises a UserError unless the values of `summary` are those of the reference."""
    for name in values:
        expected = reference[name]
        if not abs(values[name] - expected) <= TOLERANCE[case.dtype] * abs(expected):
            raise UserError(
                f"{case.name} on {case.shape} {case.targets} computes something else: {name} is "
                f"{values[name]:.6g}, and {expected:.6g} the first way's"
            )


def summary(found: Gradients, case: Case) -> dict[str, float]:
    """What ways are compared by: the loss, and each gradient's length and product with its input."""
    work, values = draw(case), {"loss": found.loss}
    for name in ("hidden", "kernel", "bias"):
        gradient = getattr(found, name)
        if gradient is not None:
            values[f"length of {name}'s gradient"] = float(np.linalg.norm(gradient))
            values[f"{name}'s gradient times {name}"] = float(
                np.vdot(gradient, getattr(work, name))
            )
    return values


def ratios(figures: Mapping[str, Mapping[str, Figures]]) -> dict[str, float]:
    """Below 1: the fused way is the better one."""
    quantities = {"temporary_bytes": "temporary", "peak_bytes": "peak", "seconds": "time"}
    return {
        f"{problem} {quantity} fused/{way}": ways["fused"][key] / other[key]
        for problem, ways in figures.items()
        for key, quantity in quantities.items()
        for way, other in ways.items()
        if not way.startswith("fused") and key in other and key in ways["fused"]
    }
