"""The training set as nets see it: resident on the device, or streamed from disk in blocks.

An example's row is the number of its frame among all training frames; soft targets are kept by it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from distill_jax import sharding, soft_targets
from distill_jax.data import transfer
from distill_jax.data.images import Examples
from distill_jax.trainer import Stream
from experiments.speech import frames, stream
from experiments.speech.data import Data, load_data

_CHUNK = 65536  # rows whose windows are in the host's memory at a time


class Utterances:
    """`stream.Source` of the training utterances, with stored soft targets if there are any."""

    def __init__(
        self,
        data: Data,
        store: soft_targets.Store | None = None,
        temperature: float | None = None,
    ):
        self.data, self.store, self.temperature = data, store, temperature
        self.first_rows = np.cumsum(data.lengths) - data.lengths

    def __len__(self) -> int:  # noqa: D105
        return len(self.data.lengths)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:  # noqa: D105
        one = self.data.corpus.splits["train"][number]
        fields = {"frames": one.frames, "states": self.data.class_of_state[one.states]}
        if self.store is None:
            return fields
        rows = self.first_rows[number] + np.arange(len(one.states))
        return {**fields, **soft_targets.rows(self.store, rows, self.temperature)}


def labelled(config: ConfigDict, net: ConfigDict, seeds: int) -> Sequence[Examples] | Stream:
    """All examples with their labels, for nets of so many seeds."""
    data = load_data(config)
    if config.data.block_frames:
        return _stream(config, net, Utterances(data))
    return [data.train] * seeds


def with_targets(
    config: ConfigDict,
    net: ConfigDict,
    store: soft_targets.Store,
    temperature: float,
    seeds: int,
) -> Sequence[Examples] | Stream:
    """All examples with labels and stored soft targets, checked to be made of these windows."""
    data = load_data(config)
    whole = np.arange(data.lengths.sum())
    if config.data.block_frames:
        soft_targets.check(store, whole, digests(config), temperature)
        return _stream(config, net, Utterances(data, store, temperature))
    return [soft_targets.attach(data.train, store, temperature, digests(config))] * seeds


def part(config: ConfigDict, rows: np.ndarray) -> Examples:
    """The examples at some rows, ascending; their "id" is the row."""
    data = load_data(config)
    if not config.data.block_frames:
        return frames.select(data.train, rows)
    ends = np.cumsum(data.lengths)
    needed = np.unique(np.searchsorted(ends, rows, side="right"))
    source = Utterances(data)
    read = [source[number] for number in needed]
    packed = frames.pack([one["frames"] for one in read], [one["states"] for one in read])
    ids = [np.arange(ends[number] - data.lengths[number], ends[number]) for number in needed]
    packed["id"] = np.concatenate(ids).astype(np.int32)
    return frames.select(packed, np.searchsorted(packed["id"], rows))


def random_parts(config: ConfigDict, percent: float, seeds: Sequence[int]) -> list[Examples]:
    """Every seed's own random part of the examples, all of one size, over the same frames."""
    rows = [_random_rows(config, percent, seed) for seed in seeds]
    size = min(len(own) for own in rows)
    union = part(config, np.unique(np.concatenate([own[:size] for own in rows])))
    return [frames.select(union, np.searchsorted(union["id"], own[:size])) for own in rows]


def part_with_targets(
    config: ConfigDict, examples: Examples, store: soft_targets.Store, temperature: float
) -> Examples:
    """A part joined to its stored soft targets."""
    return soft_targets.attach(examples, store, temperature, digests(config)[examples["id"]])


def _random_rows(config: ConfigDict, percent: float, seed: int) -> np.ndarray:
    """Random examples; of a streamed set, whole random utterances."""
    data = load_data(config)
    if not config.data.block_frames:
        return transfer.fraction({"id": data.train["id"]}, percent / 100, seed)["id"]
    numbers = np.arange(len(data.lengths))
    chosen = transfer.fraction({"id": numbers}, percent / 100, seed)["id"]
    ends = np.cumsum(data.lengths)
    return np.concatenate([np.arange(ends[i] - data.lengths[i], ends[i]) for i in chosen])


def windows(config: ConfigDict, rows: np.ndarray) -> Array:
    """The windows `[B, 26, 40]` of the examples at ascending rows, of which the last may be repeated."""
    data = load_data(config)
    if not config.data.block_frames:
        return _cut(_resident_frames(data), data.train["position"][rows])
    examples = part(config, rows)
    offsets = np.arange(-frames.LEFT, frames.RIGHT + 1)
    return jnp.asarray(examples["frames"][examples["position"][:, None] + offsets])


def digests(config: ConfigDict) -> np.ndarray:
    """A digest of every training window uint64 `[N]`, computed once per process."""
    data = load_data(config)
    key = f"{data.corpus.name} {data.fingerprint}"
    if key not in _DIGESTS:
        size = int(data.lengths.sum())
        starts = range(0, size, _CHUNK)
        chunks = [np.arange(start, min(start + _CHUNK, size)) for start in starts]
        _DIGESTS[key] = np.concatenate([frames.digests(part(config, rows)) for rows in chunks])
    return _DIGESTS[key]


_DIGESTS: dict[str, np.ndarray] = {}
_RESIDENT: dict[str, Array] = {}
_cut = jax.jit(frames.cut)


def _resident_frames(data: Data) -> Array:
    """The training frames on the device, copied once."""
    key = f"{data.corpus.name} {data.fingerprint}"
    if key not in _RESIDENT:
        _RESIDENT[key] = jnp.asarray(data.train["frames"])
    return _RESIDENT[key]


def _stream(config: ConfigDict, net: ConfigDict, source: Utterances) -> Stream:
    lengths, size, seed = source.data.lengths, config.data.block_frames, config.data.stream_seed
    steps = stream.steps_per_block(lengths, size, net.batch_size)
    one = next(stream.blocks(source, lengths, size, seed, read_threads=0, prefetch=0))
    shared = dict.fromkeys(one, False)
    width = frames.LEFT + 1 + frames.RIGHT
    return Stream(
        lambda first: stream.blocks(source, lengths, size, seed, first_block=first),
        steps,
        stream.block_sizes(lengths, size).epoch,
        jax.ShapeDtypeStruct((width, one["frames"].shape[1]), one["frames"].dtype),
        lambda block, mesh: sharding.put_examples(block, mesh, shared),
        shared,
        lambda step, shard: stream.make_block_epoch(step, net.batch_size, steps, shard),
    )
