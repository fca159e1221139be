"""Machines to compile for, and what is read off a program."""

import jax
import jax.numpy as jnp
import pytest

from distill_jax import models
from distill_jax.errors import UserError
from experiments.compiled import targets
from experiments.compiled.program import count_flops


def test_a_target_is_a_chip_and_how_many():
    (target,) = targets.parse(["cpu:8"])
    assert (target.name, target.size, target.chip.platform) == ("cpu:8", 8, "cpu")


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v5e:4x", "tpu:8", "h100:8x", ":8", ""])
def test_another_form_is_refused(name):
    with pytest.raises(UserError, match="expected a chip and how many, such as v5e:4x4"):
        targets.parse([name])


@pytest.mark.parametrize(("name", "extra"), [("v6e:2x2", "aot_tpu"), ("h100:8", "aot_gpu")])
def test_a_missing_compiler_is_named_with_the_command_that_brings_it(name, extra, monkeypatch):
    monkeypatch.setattr(targets, "_is_installed", lambda module: False)
    with pytest.raises(UserError, match=rf'{name} needs .*pip install -e "\.\[{extra}\]"'):
        targets.parse([name])


def test_operations_of_a_loop_are_those_of_all_rounds():
    model, inputs = models.mlp((8, 8), 4), jnp.zeros((5, 3))
    params = model.init(jax.random.key(0), inputs)

    def loss(params, inputs):
        return jnp.sum(model.apply(params, inputs))

    weights = 3 * 8 + 8 * 8 + 8 * 4
    forward = jax.make_jaxpr(loss)(params, inputs).jaxpr
    assert count_flops(forward) == 2 * 5 * weights
    # Backward there are two products for each layer, but none for the gradient of the inputs.
    both = jax.make_jaxpr(jax.grad(loss))(params, inputs).jaxpr
    assert count_flops(both) == 2 * 5 * (3 * weights - 3 * 8)

    def thrice(params, inputs):
        return jax.lax.scan(lambda _, x: (None, loss(params, inputs)), None, jnp.arange(3))[1]

    assert count_flops(jax.make_jaxpr(thrice)(params, inputs).jaxpr) == 3 * 2 * 5 * weights


@pytest.mark.parametrize(
    ("stride", "padding", "places"),
    # Windows of 4 on 16 places: all inside; the same, apart; one outside at each end, of 8 windows.
    [(1, 0, 13 * 4), (4, 0, 4 * 4), (2, 1, 8 * 4 - 2)],
)
def test_a_convolution_counts_what_lies_inside_the_image(stride, padding, places):
    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    arguments = jnp.zeros((5, 16, 16, 3)), jnp.zeros((4, 4, 3, 7))
    forward = 2 * 5 * 3 * 7 * places**2
    assert count_flops(jax.make_jaxpr(convolution)(*arguments).jaxpr) == forward
    # As many for the gradient of the images, and as many for that of the kernel.
    gradient = jax.grad(lambda *both: jnp.sum(convolution(*both)), (0, 1))
    assert count_flops(jax.make_jaxpr(gradient)(*arguments).jaxpr) == 3 * forward
