"""The teacher, in Flax Linen, and the student, in Flax NNX. Put your own here."""

import functools
import itertools

import jax.numpy as jnp
from flax import nnx

from distill_jax import models


def teacher(depth: int, width: int, num_classes: int) -> models.Model:
    """A residual network with BatchNorm; `models.from_linen` makes a model of any other module."""
    return models.resnet(depth, num_classes, width=width)


@functools.cache
def student(pixels: int, hidden: tuple[int, ...], num_classes: int) -> models.Model:
    """A small net with BatchNorm: the same model for the same sizes, so that it is compiled once."""

    def make(rngs: nnx.Rngs) -> nnx.Module:
        layers = [lambda images: images.reshape(images.shape[0], -1).astype(jnp.float32) / 255]
        for units in itertools.pairwise((pixels, *hidden)):
            layers += [nnx.Linear(*units, rngs=rngs), nnx.BatchNorm(units[1], rngs=rngs), nnx.relu]
        return nnx.Sequential(*layers, nnx.Linear(hidden[-1], num_classes, rngs=rngs))

    return models.from_nnx(make)
