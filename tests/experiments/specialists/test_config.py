"""The specialist study's presets and sweeps."""

import json

import pytest

from experiments.specialists.config import PRESETS, get_config, sweep
from launch.sweep import apply_point


def test_the_paper_preset_has_the_papers_specialists():
    config = get_config("paper")
    assert (config.clusters.count, config.clusters.size) == (61, 300)
    assert config.soft.count == 61 and not config.specialists.frozen_trunk


@pytest.mark.parametrize("preset", PRESETS)
def test_reports_fit_the_epochs(preset):
    assert_reports_fit(get_config(preset))


def assert_reports_fit(config):
    for net, epochs in (
        (config.generalist, config.generalist.epochs),
        (config.controls, config.controls.epochs),
        (config.specialists, config.specialists.epochs),
        (config.soft, config.soft.epochs),
        (config.distilled, config.controls.epochs),
        (config.distilled, config.distilled.scratch_epochs),
    ):
        assert epochs % net.report_every == 0


@pytest.mark.parametrize(
    "name", ["size", "count", "temperature", "epochs", "learning_rate", "kind", "active_by"]
)
def test_sweeps_fit_the_config(name):
    points = sweep(name)
    assert len({json.dumps(point) for point in points}) == len(points) > 2
    for point in points:
        config = get_config("default").lock()
        apply_point(config, point)
        config.update_from_flattened_dict(point)
        assert_reports_fit(config)


def test_no_other_sweep():
    with pytest.raises(
        ValueError, match=r"no sweep 'colour'; there are size, count, .*, active_by$"
    ):
        sweep("colour")
