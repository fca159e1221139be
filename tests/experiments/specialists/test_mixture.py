"""A mixture of experts: its distribution, and what its experts' gradients depend on."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses, models
from experiments.specialists.mixture import mixture

K, C, D = 3, 4, 5
EXPERT, GATE = models.mlp([6], C), models.mlp([], K)
MODEL = mixture(EXPERT, GATE, K)
INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(7, D)), jnp.float32)
LABELS = jnp.arange(7) % C


def test_it_is_the_gated_mean_of_the_experts():
    params = MODEL.init(jax.random.key(0), INPUTS)
    gates = jax.nn.softmax(GATE.apply(params["gate"], INPUTS))
    expected = 0.0
    for e in range(K):
        own = jax.tree.map(lambda leaf, e=e: leaf[e], params["experts"])
        expected += gates[:, e, None] * jax.nn.softmax(EXPERT.apply(own, INPUTS))
    np.testing.assert_allclose(jnp.exp(MODEL.apply(params, INPUTS)), expected, rtol=1e-5)


def test_an_experts_gradient_is_its_own_times_its_share_of_the_likelihood():
    """The gradient of Jacobs et al.: the reason why experts can't be trained apart."""
    params = MODEL.init(jax.random.key(1), INPUTS)
    own = jax.tree.map(lambda leaf: leaf[0], params["experts"])

    def expert_loss(own):
        return losses.hard_cross_entropy(EXPERT.apply(own, INPUTS), LABELS)

    def loss(params):
        return losses.hard_cross_entropy(MODEL.apply(params, INPUTS), LABELS).sum()

    gate = jax.nn.softmax(GATE.apply(params["gate"], INPUTS))[:, 0]
    share = gate * jnp.exp(loss_of_each(params) - expert_loss(own))
    expected = jax.grad(lambda own: jnp.sum(share * expert_loss(own)))(own)
    found = jax.tree.map(lambda leaf: leaf[0], jax.grad(loss)(params)["experts"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


def loss_of_each(params):
    return losses.hard_cross_entropy(MODEL.apply(params, INPUTS), LABELS)


def test_a_mixture_has_a_trunk_of_its_own():
    whole = models.chain(models.conv_trunk((2,), (2,)), MODEL)
    images = jnp.zeros((2, 4, 4), jnp.uint8)
    params = whole.init(jax.random.key(0), images)
    assert sorted(params) == ["conv_0", "experts", "gate"]
    total = jnp.exp(whole.apply(params, images)).sum(axis=1)
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)
