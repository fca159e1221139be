"""Image classification sets as whole NumPy arrays: the embedded MNIST, or one that TFDS prepared.

`load("embedded")` reads the four canonical idx files of this package, checked by their SHA-256.
`load("tfds:NAME")` reads a set that TensorFlow Datasets (TFDS) prepared on disk; it needs neither
TensorFlow nor a network. All mistakes that a user can correct are `UserError`s.
"""

import gzip
import hashlib
import itertools
import re
import shlex
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from distill_jax import files, shapes
from distill_jax.errors import UserError

# All arrays share the leading axis N:
#   "id"      int32 [N], unique in its source;
#   "inputs"  uint8 [N, H, W] or [N, H, W, channels] (no trailing axis of 1);
#   "label"   int32 [N].
Examples = dict[str, np.ndarray]

EMBEDDED_DIR = Path(__file__).parent / "mnist"

# SHA-256 of the uncompressed bytes; the compression may differ.
_MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
    ),
    "train-labels-idx1-ubyte.gz": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
    ),
}
_MNIST_CLASSES = 10

# NAME[/CONFIG][:VERSION]. TFDS also accepts namespaces, which may need the network, and builder
# arguments, which never name prepared data.
_TFDS_NAME = re.compile(r"(?P<set>\w+)(/[\w.-]+)?(:[\d.*]+)?")
# Examples that are decoded together: original photographs are about 1 MB each.
_TFDS_CHUNK = 100
_TEST_SPLITS = ("test", "validation", "val")
_UNLABELLED = -1  # TFDS's label of an example without one
_PROGRESS_SECONDS = 5


class Source(NamedTuple):
    """A data set. Train ids are 0..N-1 and test ids N..N+M-1, so that ids are unique."""

    name: str
    num_classes: int
    train: Examples
    test: Examples


class Prepared(NamedTuple):
    """A set that TFDS prepared, opened but not read. test_split: the split that `load` uses."""

    name: str
    builder: Any
    num_classes: int
    test_split: str


def load(name: str, data_dir: str | None = None, side: int = 0) -> Source:
    """Reads a whole data set into memory; sets other than the embedded one are validated.

    Args:
        name: "embedded" for the MNIST of this package (60,000 and 10,000 examples in file order),
            or "tfds:NAME[/CONFIG][:VERSION]" for a prepared TFDS set with the features `image` and
            `label`. Its split "train" is the training set; the test set is the first of "test",
            "validation" and "val" that it has and that is labelled. A split is unlabelled (as the test
            splits of imagenet2012 and i_naturalist2021 are) if its first 100 labels are all -1; the
            last of the three splits that exist is not checked. Ids follow the order on disk, which
            TFDS derives from hashes: they differ from those of "embedded".
        data_dir: for "embedded", another folder with the four files (still checked); for "tfds:",
            TFDS's data_dir, None for its default ($TFDS_DATA_DIR or ~/tensorflow_datasets).
        side: for "tfds:" only. 0 leaves images unchanged; they must then all have one size. Otherwise
            each is resized to side x side pixels when it is read: the largest square at its centre,
            by antialiased bilinear interpolation.

    Raises:
        UserError: unknown name; a side below 0, or for "embedded"; a missing or damaged file; a TFDS
            set that is missing, not prepared, or prepared without random access (the message has the
            command that prepares it), or damaged, or without the splits, features or images of one
            size, or too large for the memory; see `validate`.
    """
    if side < 0 or (side and name == "embedded"):
        raise UserError(
            f"data.side must be 0 or, for a TFDS set, pixels to resize images to, not {side} for {name}"
        )
    if name == "embedded":
        return _load_embedded(EMBEDDED_DIR if data_dir is None else files.local_path(data_dir))
    prepared = open_prepared(name, data_dir)
    train = _read_tfds_split(prepared, "train", side, first_id=0)
    return Source(name, prepared.num_classes, train, read_test(prepared, side))


def check_source(name: str, data_dir: str | None = None) -> Path | None:
    """The folder of a TFDS set; None for "embedded", whose files can be no others.

    Raises:
        UserError: if `load` would find no such set; none of its images are read.
    """
    if name != "embedded":
        return Path(open_prepared(name, data_dir).builder.data_dir)
    folder = EMBEDDED_DIR if data_dir is None else files.local_path(data_dir)
    missing = [file for file in _MNIST_SHA256 if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{folder / missing[0]}: no such file; data.data_dir has the four MNIST files"
        )
    return None


def open_prepared(name: str, data_dir: str | None = None) -> Prepared:
    """Opens a "tfds:" set without reading it; arguments and errors as for `load`."""
    kind, _, set_name = name.partition(":")
    if kind != "tfds" or not _TFDS_NAME.fullmatch(set_name):
        raise UserError(
            f"unknown data source {name!r}: expected 'embedded' (the MNIST of this package) or "
            "'tfds:NAME[/CONFIG][:VERSION]' (a prepared TFDS set, such as 'tfds:mnist')"
        )
    # Imported here because it can take seconds, and the embedded set does not need it.
    import tensorflow_datasets as tfds

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


def read_test(prepared: Prepared, side: int = 0) -> Examples:
    """Reads the test set into memory; ids, `side` and errors as for `load`."""
    size = prepared.builder.info.splits["train"].num_examples
    return _read_tfds_split(prepared, prepared.test_split, side, first_id=size)


def validate(examples: Examples, num_classes: int, what: str) -> None:
    """Checks that examples can be trained on.

    Args:
        examples: needs "id", "inputs" and "label"; any further arrays are checked too.
        num_classes: labels must be integers in 0..num_classes-1.
        what: description of the examples, with which each message begins.

    Raises:
        UserError: if an array is missing; if lengths differ; if there are no examples; if the inputs
            are neither uint8 nor floating point; for NaN or infinity; if labels are not integers or
            out of range.
    """
    missing = [key for key in ("id", "inputs", "label") if key not in examples]
    if missing:
        raise UserError(f"{what}: array {', '.join(missing)} is missing; found {sorted(examples)}")
    for key, array in examples.items():
        if not hasattr(array, "shape"):
            raise UserError(f"{what}: {key} is {shapes.describe(array)}; expected an array")
    lengths = {key: array.shape[:1] for key, array in examples.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {list(length)}" for key, length in lengths.items())
        raise UserError(f"{what}: arrays must have one length, found {listed}")

    ids, images, labels = examples["id"], examples["inputs"], examples["label"]
    if not len(ids):
        raise UserError(f"{what}: no examples")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{what}: inputs must be uint8 or floating point, found {images.dtype}")
    for key, array in examples.items():
        if np.issubdtype(array.dtype, np.floating):
            broken = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
            if broken.any():
                raise UserError(
                    f"{what}: {key} has NaN or infinity in {broken.sum()} of {len(ids)} examples, "
                    f"the first has id {ids[broken.argmax()]}"
                )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{what}: label must be an integer, found {labels.dtype}")
    bad = np.logical_or(labels < 0, labels >= num_classes)
    if bad.any():
        first = bad.argmax()
        raise UserError(
            f"{what}: {bad.sum()} of {len(bad)} labels are outside 0..{num_classes - 1}, "
            f"the first is {labels[first]} at id {ids[first]}"
        )


def _load_embedded(folder: Path) -> Source:
    train = _mnist_examples(folder, "train", first_id=0)
    test = _mnist_examples(folder, "t10k", first_id=len(train["id"]))
    return Source("embedded", _MNIST_CLASSES, train, test)


def _mnist_examples(folder: Path, prefix: str, first_id: int) -> Examples:
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    return _examples(images, labels, first_id)


def _examples(images: np.ndarray, labels: np.ndarray, first_id: int) -> Examples:
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    ids = np.arange(first_id, first_id + len(images), dtype=np.int32)
    return {"id": ids, "inputs": images, "label": labels.astype(np.int32)}


def _read_idx(path: Path) -> np.ndarray:
    """The uint8 array of one of the four MNIST files, checked."""
    sha256 = _MNIST_SHA256[path.name]
    expected = (
        f"{path}: expected the gzipped MNIST file with SHA-256 {sha256} (uncompressed), found "
    )
    try:
        with gzip.open(path) as file:
            content = file.read()
    except FileNotFoundError:
        raise UserError(expected + "no file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{expected}one that cannot be read: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{expected}{len(content)} bytes with {found}")
    # Big-endian: two zero bytes, type code 8 (uint8), the number of axes, their sizes, the data.
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    # Copied, because an array over `bytes` is read-only.
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def _find_test_split(builder: Any, source_name: str) -> str:
    splits = sorted(builder.info.splits)
    candidates = [split for split in _TEST_SPLITS if split in splits]
    if "train" not in splits or not candidates:
        raise UserError(
            f"{source_name}: splits 'train' and 'test' (or 'validation', 'val') are needed, "
            f"this set has {', '.join(splits)}"
        )
    for split in candidates[:-1]:
        first = itertools.islice(_tfds_examples(builder, source_name, split), _TFDS_CHUNK)
        if any(example["label"] != _UNLABELLED for example in first):
            return split
    return candidates[-1]


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


def _read_tfds_split(prepared: Prepared, split: str, side: int, first_id: int) -> Examples:
    source_name, builder = prepared.name, prepared.builder
    size = builder.info.splits[split].num_examples
    images: np.ndarray | None = None
    labels = np.empty(size, np.int32)
    shown = time.monotonic()
    for row, example in enumerate(_tfds_examples(builder, source_name, split)):
        image = resize(example["image"], side) if side else example["image"]
        if images is None:
            images = _allocate((size, *image.shape), f"{source_name}, {split}")
        # Checked one by one, before a set of many large images fills the memory.
        if image.shape != images.shape[1:]:
            raise UserError(
                f"{source_name}, {split}: all images must have one size, the first is "
                f"{list(images.shape[1:])}, the one with id {first_id + row} is "
                f"{list(image.shape)}; data.side is the size to which they can be resized"
            )
        images[row], labels[row] = image, example["label"]
        if time.monotonic() - shown > _PROGRESS_SECONDS:
            shown = time.monotonic()
            print(f"{source_name}, {split}: {row + 1} of {size} images read", flush=True)
    if images is None:
        raise UserError(f"{source_name}, {split}: no examples")
    examples = _examples(images, labels, first_id)
    validate(examples, prepared.num_classes, f"{source_name}, {split}")
    return examples


def _allocate(shape: tuple[int, ...], what: str) -> np.ndarray:
    """One array for all images: a list that is stacked at the end would need twice the memory."""
    try:
        return np.empty(shape, np.uint8)
    except MemoryError as error:
        raise UserError(
            f"{what}: images {list(shape)} don't fit the memory; data.side is the size to which they "
            "can be resized"
        ) from error


def resize(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes the central square: uint8 `[H, W, channels]` -> uint8 `[side, side, channels]`."""
    image = np.atleast_3d(image)
    height, width, channels = image.shape
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    square = image[top : top + size, left : left + size]
    planes = [Image.fromarray(square[..., channel]) for channel in range(channels)]
    resized = [plane.resize((side, side), Image.Resampling.BILINEAR) for plane in planes]
    return np.stack([np.asarray(plane) for plane in resized], axis=-1)


def _tfds_examples(builder: Any, source_name: str, split: str) -> Iterator[dict[str, Any]]:
    """The decoded examples of a split, in the order on disk."""
    source = builder.as_data_source(split)
    for start in range(0, len(source), _TFDS_CHUNK):
        try:
            chunk = source.__getitems__(range(start, min(start + _TFDS_CHUNK, len(source))))
        # A missing or damaged file: RuntimeError of array_record, OSError of pillow.
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{source_name}, {split}: the files in {builder.data_dir} cannot be read "
                f"({error}). Delete that folder and prepare the set again"
            ) from error
        yield from chunk
