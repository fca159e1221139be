"""The presets of all studies."""

import importlib

import pytest


@pytest.mark.parametrize("study", ["mnist", "speech", "specialists"])
def test_presets_have_the_same_fields(study):
    config = importlib.import_module(f"experiments.{study}.config")

    def fields(tree):
        return {
            name: fields(part) if isinstance(part, dict) else None for name, part in tree.items()
        }

    presets = [fields(config.get_config(name).to_dict()) for name in config.PRESETS]
    assert all(preset == presets[0] for preset in presets)
    assert config.PRESETS == ("smoke", "default", "full", "paper")
    with pytest.raises(ValueError, match="no preset 'tiny'; there are smoke, default, full, paper"):
        config.get_config("tiny")
