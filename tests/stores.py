"""A small store of soft targets, and what is in its folder."""

from pathlib import Path

import numpy as np

from distill_jax import soft_targets

N, CLASSES, SHARD, BATCH = 50, 12, 16, 6


DIGESTS = soft_targets.digests(np.arange(N))


RUN = {
    "teacher": "abc",
    "data": {"alignment": "ab12"},
    "encoding": "top_k",
    "k": 3,
    "temperatures": 2.0,
    "probabilities": True,
    "num_classes": CLASSES,
}


def tiny_targets(rows):
    """Multiples of 1/64, whose sums are exact in any order, so that stores can be compared by bytes."""
    counts = [
        np.random.default_rng(row).multinomial(64, np.arange(1, CLASSES + 1) / 78) for row in rows
    ]
    return np.array(counts, np.float32) / 64


def write(directory, source=tiny_targets, digests=DIGESTS, **changes):
    sizes = {"shard_rows": SHARD, "batch_size": BATCH}
    soft_targets.write(directory, source, digests, **{**RUN, **sizes, **changes})
    return directory


def content(directory):
    paths = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def never(rows):
    raise AssertionError("nothing was left to do")
