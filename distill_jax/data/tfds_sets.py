"""Image sets that TensorFlow Datasets (TFDS) prepared on disk, read without TensorFlow or a network."""

import itertools
import re
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from distill_jax import files
from distill_jax.data import records
from distill_jax.data.examples import TEST_SPLITS, resize
from distill_jax.data.records import OnDisk, Records
from distill_jax.errors import UserError

# NAME[/CONFIG][:VERSION]. TFDS also accepts namespaces, which may need the network, and builder
# arguments, which never name prepared data.
_NAME = re.compile(r"(?P<set>\w+)(/[\w.-]+)?(:[\d.*]+)?")
_LABELS_SEEN = 100  # of a split, to find out whether it has any
_UNLABELLED = -1  # TFDS's label of an example without one


class Prepared(NamedTuple):
    """A set that TFDS prepared. test_split: the split that is its test set."""

    name: str
    builder: Any
    num_classes: int
    test_split: str


def is_name(set_name: str) -> bool:
    """Whether a set may be called so: NAME[/CONFIG][:VERSION]."""
    return _NAME.fullmatch(set_name) is not None


def find(set_name: str, data_dir: str | None = None) -> Prepared:
    """Finds a set, and reads no more of it than a few labels; arguments and errors as `images.load`."""
    # Imported here because it can take seconds, and other sets do not need it.
    import tensorflow_datasets as tfds

    name = f"tfds:{set_name}"
    where = None if data_dir is None else str(files.local_path(data_dir))
    builder = _prepared_builder(tfds, set_name, where)
    # Sorted for the message: in TFDS their order changes from run to run.
    found = dict(sorted(builder.info.features.items()))
    has_images = "image" in found and found["image"].np_dtype == np.uint8
    if not has_images or not isinstance(found.get("label"), tfds.features.ClassLabel):
        raise UserError(
            f"{name}: an image classification set has the features image (uint8) and label "
            f"(ClassLabel), this one has {found}"
        )
    return Prepared(name, builder, found["label"].num_classes, _find_test_split(builder, name))


def open_set(prepared: Prepared, side: int = 0) -> OnDisk:
    """Opens a set; ids, `side` and errors as `images.load`."""
    info = prepared.builder.info
    train = _records(prepared, "train", side, first_id=0)
    test = _records(prepared, prepared.test_split, side, first_id=train.size)
    names = tuple(info.features["label"].names)
    return OnDisk(prepared.name, prepared.num_classes, train, test, names)


def _records(prepared: Prepared, split: str, side: int, first_id: int) -> Records:
    """The examples of a split, in the order on disk."""
    from tensorflow_datasets import decode

    info, name = prepared.builder.info, f"{prepared.name}, {split}"
    if not info.splits[split].num_examples:
        raise UserError(f"{name}: no examples")
    raw = decode.DeserializeMethod.RAW_BYTES
    source = prepared.builder.as_data_source(split, deserialize_method=raw)
    shards = [(file.filename, file.take) for file in info.splits[split].file_instructions]

    def parse(record: bytes) -> dict[str, ArrayLike]:
        example = info.features.deserialize_example_np(record)
        image = resize(example["image"], side) if side else example["image"]
        # A trailing axis of 1 is dropped, as in `Examples`.
        image = image[..., 0] if image.shape[2:] == (1,) else image
        return {"inputs": image, "label": np.int32(example["label"])}

    hint = "; data.side is the size to which images can be resized"
    return records.of_shards(
        source, shards, parse, prepared.num_classes, name=name, first_id=first_id, hint=hint
    )


def _find_test_split(builder: Any, source_name: str) -> str:
    splits = sorted(builder.info.splits)
    candidates = [split for split in TEST_SPLITS if split in splits]
    if "train" not in splits or not candidates:
        raise UserError(
            f"{source_name}: splits 'train' and 'test' (or 'validation', 'val') are needed, "
            f"this set has {', '.join(splits)}"
        )
    for split in candidates[:-1]:
        first = itertools.islice(_labels(builder, source_name, split), _LABELS_SEEN)
        if any(label != _UNLABELLED for label in first):
            return split
    return candidates[-1]


def _labels(builder: Any, source_name: str, split: str) -> Iterator[int]:
    source = builder.as_data_source(split)
    try:
        for number in range(len(source)):
            yield source[number]["label"]
    # A missing or damaged file: RuntimeError of array_record, OSError of pillow.
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{source_name}, {split}: the files in {builder.data_dir} can't be read ({error}). "
            "Delete that folder and prepare the set again"
        ) from error


def _prepared_builder(tfds: Any, set_name: str, data_dir: str | None) -> Any:
    """TFDS's builder of a set that is on disk in a format with random access.

    These are the two steps of `tfds.data_source(..., download=False)`. Done one by one, the three ways
    in which a set can be absent get messages of their own. No step uses the network.
    """
    where = "TFDS's default data_dir" if data_dir is None else data_dir
    command = _prepare_command(set_name, data_dir)
    try:
        builder = tfds.builder(set_name, data_dir=data_dir, try_gcs=False)
    # An unknown name, config or version, or a missing package that TFDS needs for the set.
    except (ValueError, AssertionError, ImportError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(
            f"tfds:{set_name} is not in {where} ({reason}). "
            f"A set that TFDS knows is prepared by: {command}"
        ) from error
    if not builder.is_prepared():
        raise UserError(
            f"tfds:{set_name} is not prepared: {builder.data_dir} is no prepared set. "
            f"Prepare it by: {command}"
        )
    found = builder.info.available_file_formats()
    if not found & tfds.core.FileFormat.with_random_access():
        listed = ", ".join(sorted(file_format.value for file_format in found))
        raise UserError(
            f"tfds:{set_name} is prepared as {listed}, which has no random access. Delete "
            f"{builder.data_dir} (or name another data_dir) and prepare it by: {command}"
        )
    return builder


def _prepare_command(set_name: str, data_dir: str | None) -> str:
    where = "" if data_dir is None else f" --data_dir={shlex.quote(str(data_dir))}"
    if re.split("[/:]", set_name)[0] == "mnist":
        return f"python -m distill_jax.data.prepare_tfds{where}"
    return f"pip install tensorflow && tfds build {set_name}{where} --file_format=array_record"
