"""A speech study that is small enough for tests."""

from experiments.speech.config import get_config


def config_of(block_frames=0):
    config = get_config("smoke")
    config.data.update(train_frames=3000, validation_frames=1500, test_frames=1500)
    config.data.min_frames = 50
    config.data.block_frames = block_frames
    config.soft_targets.shard_rows = 1024
    return config
