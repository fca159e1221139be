"""The examples in docstrings run, and the modules that users call most have one for each function.

Arrays are printed with 3 digits.
"""

import doctest
import importlib
import inspect
import pkgutil

import jax
import numpy as np
import pytest

import distill_jax

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(distill_jax.__path__, "distill_jax.")
)
WITH_EXAMPLES = [
    "distill_jax.fused_loss",
    "distill_jax.later_losses",
    "distill_jax.losses",
    "distill_jax.metrics",
    "distill_jax.multi_label",
    "distill_jax.optimizers",
    "distill_jax.soft_targets.class_maps",
    "distill_jax.soft_targets.compare",
    "distill_jax.soft_targets.encodings",
    "distill_jax.soft_targets.identity",
    "distill_jax.soft_targets.store",
    "distill_jax.soft_targets.top_k_writer",
    "distill_jax.soft_targets.views",
    "distill_jax.soft_targets.writer",
    "distill_jax.specialists.clustering",
    "distill_jax.specialists.coverage",
    "distill_jax.specialists.enrichment",
    "distill_jax.specialists.eq5",
    "distill_jax.specialists.eq5_problem",
    "distill_jax.specialists.heads",
    "distill_jax.specialists.inference",
    "distill_jax.specialists.store",
    "distill_jax.top_k_losses",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name):
    promotion = "standard" if name == "distill_jax.optimizers" else "strict"  # optax promotes
    with np.printoptions(precision=3, suppress=True), jax.numpy_dtype_promotion(promotion):
        result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert not result.failed


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_every_public_function_has_an_example(name):
    module = importlib.import_module(name)
    own = {
        name: function
        for name, function in vars(module).items()
        if inspect.isroutine(inspect.unwrap(function)) and not name.startswith("_")
        if getattr(function, "__module__", None) == module.__name__
    }
    assert own and not [
        name for name, function in own.items() if "Examples:\n" not in (function.__doc__ or "")
    ]
