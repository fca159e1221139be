"""Made-up soft targets and logits; a small store, and what is in its folder."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from distill_jax import losses, soft_targets

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


def soft(shape, seed=0, scale=4.0, temperature=1.0):
    """Probabilities float32 of a made-up teacher, who finds some classes likelier than others."""
    random = np.random.default_rng(seed)
    logits = scale * (random.standard_normal(shape) + random.standard_normal(shape[-1]))
    return losses.softmax(jnp.asarray(logits, jnp.float32), temperature)


def student(shape, seed=1, scale=4.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def drawn(ids):
    """Drawn classes as the fields of the k largest."""
    return ids, jnp.full((len(ids), 1), 1 / ids.shape[-1]), jnp.zeros(len(ids))


def joined(store, name):
    return np.concatenate([shard[name] for shard in store.shards])
