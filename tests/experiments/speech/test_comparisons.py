"""Which students the temperatures are compared on."""

from pathlib import Path

from experiments.common.study import Context
from experiments.speech import comparisons
from experiments.speech.config import get_config


def test_temperatures_are_compared_on_students_of_one_length(monkeypatch):
    asked = []

    def distil(context, name, net, temperature, *, seeds):
        asked.append((name, net.epochs, temperature, seeds))
        return "own"

    monkeypatch.setattr(comparisons.nets, "distil", distil)
    monkeypatch.setattr(comparisons.nets, "load_students", lambda context: "of table 1")
    config = get_config("smoke")
    context = Context(config, Path(), {})
    assert comparisons.at_temperature(context, 2.0) == "of table 1"
    assert comparisons.at_temperature(context, 1.0) == "own"
    config.temperature.update(seeds=2, epochs=4)
    assert comparisons.at_temperature(context, 2.0) == "own"
    assert asked == [
        ("temperature_1", config.distilled.epochs, 1.0, (0,)),
        ("temperature_2", 4, 2.0, (0, 1)),
    ]
