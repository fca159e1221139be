"""The specialist study on colour images that a user brings."""

import numpy as np
import tensorflow_datasets as tfds
from command import run
from result_rows import find
from tfds_sets import prepare_tiny

from experiments.common import report
from experiments.specialists.config import get_config

SMOKE = "--config=experiments/specialists/config.py:smoke"


def coloured(count, seed):
    """Squares of many sizes, with a pattern of 4 x 4 colours for each of 20 classes, and noise."""
    patterns = np.random.default_rng(0).uniform(80, 180, (20, 4, 4, 3))
    random, images = np.random.default_rng([1, seed]), []
    labels = np.arange(count) % 20
    for label in labels:
        noisy = np.clip(patterns[label] + random.normal(0, 60, (4, 4, 3)), 0, 255)
        scale = int(random.integers(4, 12))
        images.append(noisy.astype(np.uint8).repeat(scale, 0).repeat(scale, 1))
    return images, labels.tolist()


def test_a_set_of_colour_images_that_tfds_prepared(tmp_path):
    prepare_tiny(
        tmp_path / "data",
        {"train": coloured(400, 0), "test": coloured(100, 1)},
        image_feature=tfds.features.Image(shape=(None, None, 3)),
        label_feature=tfds.features.ClassLabel(num_classes=20),
    )
    run(
        SMOKE,
        "--stages=generalist,clusters,specialists,report",
        f"--workdir={tmp_path}/run",
        "--config.data.source=tfds:tiny",
        f"--config.data.data_dir={tmp_path}/data",
        "--config.data.side=32",
        "--config.data.difficulty=0",
        "--config.data.views=1",
        "--config.data.classes=0",
        "--config.seeds=(0,)",
        "--config.generalist.batch_size=32",
        "--config.clusters.size=6",
    )
    rows = report.load_rows(tmp_path / "run" / "results.json")
    full = f"generalist + {get_config('smoke').clusters.count} specialists"
    for name in ("generalist", full):
        for metric in ("test_accuracy", "conditional_test_accuracy"):
            assert 20 < find(rows, "specialists", name, metric)["value"] <= 100
    assert find(rows, "specialists", full, "validation_relative_change_percent")
    assert not [row for row in rows if "seen" in row["metric"]]
    assert {(row["source"], row["seeds"], row["std"]) for row in rows} == {("tfds:tiny", 1, None)}
    assert (tmp_path / "run/figures/clusters.png").exists()
