"""The table of costs: what it measures, against numbers that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from ml_collections import ConfigDict

from distill_jax import metrics, models, nets
from experiments.common import costs

CONFIG = ConfigDict({"selection": "last", "preset": "smoke", "data": {"source": "mine"}})
IMAGES = tiny.examples(40)["inputs"]


def net_of(units, seed=0):
    model = models.mlp([units], tiny.CLASSES)
    return nets.Net(model, model.init(jax.random.key(seed), IMAGES[:1]), [], 0.0, None, {})


def test_rows_of_nets():
    big, small = net_of(32), net_of(4)
    labels = np.asarray(big.logits(IMAGES)).argmax(-1)
    labels[:10] = -1
    named = [costs.of_net("big", big), costs.of_net("small", small)]
    rows = costs.rows(CONFIG, "my_costs", named, IMAGES, labels)
    values = {(row["row"], row["metric"]): row["value"] for row in rows}
    for row, units in (("big", 32), ("small", 4)):
        assert values[row, "parameters"] == 16 * units + units + units * 3 + 3
        assert values[row, "ms_for_256"] > 0 and values[row, "ms_for_1"] > 0
        assert values[row, "exported_bytes"] > 4 * values[row, "parameters"]
        assert 2 * 19 * units <= values[row, "flops_per_example"] < 5 * 19 * units + 200
    assert values["big", "error_percent"] == 0 and ("big", "kl_to_teacher") not in values
    z, v = (np.float64(net.logits(IMAGES)) for net in (small, big))
    log_q, log_p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (z, v))
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    np.testing.assert_allclose(values["small", "kl_to_teacher"], expected, rtol=1e-4)
    likelihood = -log_q[np.arange(10, 40), labels[10:]].mean()
    np.testing.assert_allclose(values["small", "negative_log_likelihood"], likelihood, rtol=1e-5)
    same = 100 * (z.argmax(-1) == v.argmax(-1)).mean()
    np.testing.assert_allclose(values["small", "agreement_percent"], same, rtol=1e-5)


def test_calibration_is_that_of_bins():
    random = np.random.default_rng(0)
    logits = 3 * random.standard_normal((200, 4)).astype(np.float32)
    labels = random.integers(-1, 4, 200)
    p = np.exp(np.float64(logits))
    p /= p.sum(-1, keepdims=True)
    confidence, right, known = p.max(-1), p.argmax(-1) == labels, labels >= 0
    expected = 0.0
    for low in np.arange(15) / 15:
        here = known & (confidence >= low) & (confidence < low + 1 / 15)
        if here.any():
            expected += here.sum() * abs(right[here].mean() - confidence[here].mean())
    found = metrics.expected_calibration_error(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(found, expected / known.sum(), rtol=1e-4)
