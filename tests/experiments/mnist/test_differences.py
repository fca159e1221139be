"""What is said of temperatures, from errors that are known."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from experiments.mnist.differences import of_temperatures

CONFIG = ConfigDict({"selection": "last", "preset": "full", "data": {"source": "embedded"}})
TEMPERATURES = (1.0, 2.5, 4.0, 8.0, 12.0, 32.0)
ERRORS = np.array(
    [
        [390, 400, 410],
        [350, 352, 360],
        [352, 350, 358],
        [380, 380, 380],
        [400, 405, 410],
        [420, 430, 440],
    ],
    float,
)


def test_ranges_of_temperatures_are_compared_seed_by_seed():
    found = {
        row["row"].removeprefix("2x30, "): row
        for row in of_temperatures(CONFIG, "2x30", TEMPERATURES, ERRORS)
    }
    middle, hot = ERRORS[1:3].mean(axis=0), ERRORS[4:].mean(axis=0)
    warm = found["T from 2.5 to 4 less T above 8"]
    assert warm["values"] == (middle - hot).tolist()
    expected = stats.ttest_rel(middle, hot).confidence_interval(0.95)
    assert warm["interval"] == pytest.approx(tuple(expected))
    assert found["T from 2.5 to 4 less T below 2.5"]["value"] == pytest.approx(
        353.67 - 400, abs=0.01
    )
    assert found["highest T less lowest T above 8"]["values"] == [20.0, 25.0, 30.0]


def test_a_sweep_without_some_temperatures_is_silent_on_them():
    assert not of_temperatures(CONFIG, "2x30", (1.0, 20.0), ERRORS[:2])
    (row,) = of_temperatures(CONFIG, "2x30", (2.5, 20.0), ERRORS[:2, :1])
    assert (row["values"], row["interval"]) == ([40.0], None)
