"""The specialist study's presets and sweeps."""

import pytest

from experiments.specialists.config import get_config, sweep


def test_the_paper_preset_has_the_papers_specialists():
    config = get_config("paper")
    assert (config.clusters.count, config.clusters.size) == (61, 300)
    assert config.soft.count == 61 and not config.specialists.frozen_trunk


def test_no_other_sweep():
    with pytest.raises(ValueError, match=r"no sweep 'colour'; there are size, count, .*, method$"):
        sweep("colour")
