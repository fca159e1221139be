"""Image classification sets from wherever they are: the embedded MNIST, files, folders, TFDS, arrays.

    embedded        the MNIST of this package, four idx files checked by their SHA-256
    npz:FILE        arrays x_train, y_train, x_test, y_test
    idx:FOLDER      four files named like MNIST's
    images:FOLDER   train/CLASS/*.png and test/CLASS/*.png, or CLASS/*.png alone
    tfds:NAME       a set that TensorFlow Datasets prepared on disk

`load` reads any of them as NumPy arrays, `open_set` opens those that can be left on disk, `from_arrays`
makes the same of arrays. All mistakes that a user can correct are `UserError`s.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill_jax import files, shapes
from distill_jax.data import array_files, image_folders, tfds_sets
from distill_jax.data.array_files import EMBEDDED_DIR, MNIST_SHA256, Pair
from distill_jax.data.examples import (
    Counts,
    Examples,
    Source,
    check_classes,
    check_share,
    draw_test,
    resize,
    say_once,
    validate,
    with_ids,
)
from distill_jax.data.records import OnDisk, read_all
from distill_jax.errors import UserError

_NAMES = (
    "'embedded' (the MNIST of this package), 'npz:FILE', 'idx:FOLDER', 'images:FOLDER' or "
    "'tfds:NAME[/CONFIG][:VERSION]' (a prepared TFDS set, such as 'tfds:mnist')"
)
_ON_DISK = ("images", "tfds")
# Bytes at a file's ends that name its content: of an image few, as there may be a million; of idx files
# all, as they hold no sum of what is between.
_ENDS, _WHOLE = 2**12, 2**40


def load(
    name: str,
    data_dir: str | None = None,
    side: int = 0,
    *,
    test_share: float = 0.0,
    seed: int = 0,
) -> Source:
    """Reads a whole data set into memory; all but the embedded one are validated.

    Args:
        name: one of

            - "embedded": the MNIST of this package, 60,000 and 10,000 examples in file order.
            - "npz:FILE": arrays x_train, y_train, x_test and y_test (as in Keras's files), or
              train_images, train_labels, test_images and test_labels (MedMNIST's), or without a test
              set x and y, or images and labels; as for `from_arrays`. "class_names", an array of texts,
              may be there; other arrays are not read.
            - "idx:FOLDER": four files named like MNIST's, of any size, with or without .gz; the names
              may begin with anything, and FOLDER/emnist-letters names one of several sets.
            - "images:FOLDER": PNG and JPEG files in train/CLASS and test/CLASS (or validation, val),
              or in CLASS alone. Classes are numbered in the order of their names; those of test must be
              in train. Images are grey if all of them are, else RGB, as a white page shows them. Ids
              follow a hash of the files' names. Hidden files are skipped.
            - "tfds:NAME[/CONFIG][:VERSION]": a prepared TFDS set with the features `image` and `label`.
              Its split "train" is the training set; the test set is the first of "test", "validation"
              and "val" that it has and that is labelled. A split is unlabelled (as the test splits of
              imagenet2012 and i_naturalist2021 are) if its first 100 labels are all -1; the last of the
              three splits that exist is not checked. Ids follow the order on disk, which TFDS derives
              from hashes: they differ from those of "embedded".
        data_dir: for "embedded", another folder with the four files (still checked); for "tfds:",
            TFDS's data_dir, None for its default ($TFDS_DATA_DIR or ~/tensorflow_datasets).
        side: 0 leaves images unchanged; they must then all have one size. Otherwise each is resized to
            side x side pixels when it is read: the largest square at its centre, by antialiased bilinear
            interpolation. Not for "embedded".
        test_share: for "npz:" and "images:" without a test set: the share of each class that is one.
        seed: of the examples that are held out for it.

    Raises:
        UserError: unknown name; a side, data_dir or test_share where it has no meaning; what is missing,
            damaged or can't be trained on, with the path, the array or the command that prepares a TFDS
            set; a set too large for the memory; see `validate`.
    """
    kind, where = _split_name(name, data_dir, side, test_share)
    if kind == "embedded":
        return array_files.load_embedded(_embedded_dir(data_dir))
    if kind in _ON_DISK:
        opened = open_set(name, data_dir, side, test_share=test_share, seed=seed)
        train, test = read_all(opened.train), read_all(opened.test)
        _check_alike(train["inputs"], test["inputs"], name)
        return Source(name, opened.num_classes, train, test, opened.class_names)
    path = files.local_path(where)
    if kind == "npz":
        train_pair, test_pair, class_names = array_files.read_npz(path)
    else:
        (train_pair, test_pair), class_names = array_files.read_idx(array_files.find_idx(path)), ()
    source = from_arrays(
        train_pair, test_pair, class_names, name=name, test_share=test_share, seed=seed
    )
    return _resized(source, side) if side else source


def open_set(
    name: str,
    data_dir: str | None = None,
    side: int = 0,
    *,
    test_share: float = 0.0,
    seed: int = 0,
) -> OnDisk:
    """Opens an "images:" or "tfds:" set without reading it; arguments and errors as for `load`."""
    kind, where = _split_name(name, data_dir, side, test_share)
    if kind == "tfds":
        return tfds_sets.open_set(tfds_sets.find(where, data_dir), side)
    if kind == "images":
        return image_folders.open_set(
            image_folders.find(files.local_path(where), test_share, seed), side
        )
    raise UserError(f"{name} is read whole: only images: and tfds: sets can be left on disk")


def check_source(
    name: str, data_dir: str | None = None, *, test_share: float = 0.0, seed: int = 0
) -> str | None:
    """Names the content of a set; None for "embedded", whose files can be no others.

    Args:
        name, data_dir, test_share, seed: as for `load`.

    Returns:
        16 hex digits of a hash; of npz files, images and TFDS's files both ends count, and those of npz
        and PNG files hold sums of all that is in them.

    Raises:
        UserError: if `load` would find no such set; none of its images are read.
    """
    kind, where = _split_name(name, data_dir, 0, test_share)
    if kind == "embedded":
        folder = _embedded_dir(data_dir)
        missing = [file for file in MNIST_SHA256 if not (folder / file).is_file()]
        if missing:
            raise UserError(
                f"{folder / missing[0]}: no such file; data.data_dir has the four MNIST files"
            )
        return None
    if kind == "tfds":
        return files.content_of(Path(tfds_sets.find(where, data_dir).builder.data_dir))
    path = files.local_path(where)
    if kind == "npz":
        check_share(test_share, "x_test" in array_files.npz_keys(path), name)
        return files.content_of(path.parent, [path])
    if kind == "idx":
        found = array_files.find_idx(path)
        folder, paths = found.train[0].parent, [*found.train, *found.test]
        return files.content_of(folder, paths, ends=_WHOLE)
    images = image_folders.find(path, test_share, seed)
    paths = [file for file, _ in images.train + images.test]
    return files.content_of(path, paths, ends=_ENDS)


def count(
    name: str, data_dir: str | None = None, *, test_share: float = 0.0, seed: int = 0
) -> Counts:
    """How large a set is, without reading its images; arguments and errors as for `check_source`."""
    kind, where = _split_name(name, data_dir, 0, test_share)
    if kind == "embedded":
        return Counts(10, 60_000, 10_000)
    if kind == "tfds":
        found = tfds_sets.find(where, data_dir)
        sizes = (found.builder.info.splits[s].num_examples for s in ("train", found.test_split))
        return Counts(found.num_classes, *sizes)
    path = files.local_path(where)
    if kind == "images":
        folder = image_folders.find(path, test_share, seed)
        return Counts(len(folder.class_names), len(folder.train), len(folder.test))
    if kind == "npz":
        train, test, classes = array_files.read_npz_labels(path)
    else:
        (train, test), classes = array_files.read_idx_labels(array_files.find_idx(path)), 0
    classes = classes or len(np.unique(train))
    if test is not None:
        return Counts(classes, len(train), len(test))
    check_share(test_share, False, name)
    drawn = draw_test(train.ravel(), test_share, seed, name)
    return Counts(classes, int((~drawn).sum()), int(drawn.sum()))


def from_arrays(
    train: Pair,
    test: Pair | None = None,
    class_names: Sequence[str] = (),
    *,
    name: str = "arrays",
    test_share: float = 0.0,
    seed: int = 0,
) -> Source:
    """A source of arrays.

    Args:
        train: images, uint8 or floating point in 0..1 (which become bytes: 255 x, rounded), `[N, H, W]`
            or `[N, H, W, channels]` with 1 to 4 channels; and labels, integers `[N]` or `[N, 1]`.
        test: the same, of M examples; None: a share of train's is it.
        class_names: `[C]`, labels are 0..C-1. Without them the classes are the labels that occur in
            train; if these are not 0..C-1, they are numbered so in their order, which is printed, and
            the class names are the labels as they were.
        name: of the source, with which each message begins.
        test_share, seed: as for `load`, where `test` is None.

    Raises:
        UserError: for another dtype or shape, lengths or sizes that differ, images outside 0..1, NaN, a
            single class, labels in test that train doesn't have; for a test set and a share, or
            neither; see `validate`.

    Examples:
        >>> import numpy as np
        >>> from distill_jax.data import images
        >>> inputs = np.zeros((3, 8, 8), np.uint8)
        >>> source = images.from_arrays((inputs, [0, 1, 2]), (inputs[:2], [2, 0]))
        >>> source.num_classes, source.train["label"].tolist(), source.test["id"].tolist()
        (3, [0, 1, 2], [3, 4])
    """
    inputs, labels = _checked(*train, f"{name}, train")
    check_share(test_share, test is not None, name)
    if test is None:
        drawn = draw_test(labels, test_share, seed, name)
        test = inputs[drawn], labels[drawn]
        inputs, labels = inputs[~drawn], labels[~drawn]
    tested, test_labels = _checked(*test, f"{name}, test")
    _check_alike(inputs, tested, name)
    names, num_classes = tuple(class_names), len(class_names)
    if not names:
        names, num_classes, labels, test_labels = _numbered(labels, test_labels, name)
    check_classes(num_classes, name)
    parts = with_ids(inputs, labels, 0), with_ids(tested, test_labels, len(inputs))
    for split, examples, own in zip(("train", "test"), parts, (labels, test_labels), strict=True):
        # Labels as they were: those of 64 bits may look right in 32.
        validate({**examples, "label": own}, num_classes, f"{name}, {split}")
    return Source(name, num_classes, *parts, names)


def _numbered(
    train: np.ndarray, test: np.ndarray, name: str
) -> tuple[tuple[str, ...], int, np.ndarray, np.ndarray]:
    """Names of classes (none if they are 0..C-1 already), their number, and the labels 0..C-1."""
    values = np.unique(train)
    unknown = np.setdiff1d(test, values)
    if values[0] < 0:
        raise UserError(f"{name}: train has labels below 0")
    if len(unknown):
        raise UserError(f"{name}: train has no example of class {unknown[0]}, test has")
    if values[-1] == len(values) - 1:
        return (), len(values), train, test
    say_once(
        f"{name}: the {len(values)} labels {values[0]} to {values[-1]} are numbered "
        f"0..{len(values) - 1} in their order"
    )
    numbered = np.searchsorted(values, train), np.searchsorted(values, test)
    return tuple(map(str, values.tolist())), len(values), *numbered


def _split_name(name: str, data_dir: str | None, side: int, test_share: float) -> tuple[str, str]:
    """The kind of a source, and which one; what has no meaning for that kind is a UserError."""
    kind, _, where = name.partition(":")
    is_path = kind in ("npz", "idx", "images") and where != ""
    known = is_path or (kind == "tfds" and tfds_sets.is_name(where))
    if name != "embedded" and not known:
        raise UserError(f"unknown data source {name!r}: expected {_NAMES}")
    if side < 0 or (side and kind == "embedded"):
        raise UserError(
            "data.side must be 0 or, for all but the embedded set, pixels to resize images to, not "
            f"{side} for {name}"
        )
    if data_dir is not None and kind not in ("embedded", "tfds"):
        raise UserError(f"data.data_dir is {data_dir!r}, but {name} says itself where it is")
    if test_share and kind not in ("npz", "images"):
        raise UserError(f"data.test_share is {test_share}, but {name} has a test set")
    return kind, where


def _embedded_dir(data_dir: str | None) -> Path:
    return EMBEDDED_DIR if data_dir is None else files.local_path(data_dir)


def _checked(images: np.ndarray, labels: np.ndarray, what: str) -> Pair:
    """Images as uint8 and labels as integers `[N]`."""
    images, labels = np.asarray(images), np.asarray(labels)
    floating = np.issubdtype(images.dtype, np.floating)
    is_image = images.ndim == 3 or (images.ndim == 4 and 1 <= images.shape[3] <= 4)
    if not (images.dtype == np.uint8 or floating) or not is_image or 0 in images.shape[1:]:
        raise UserError(
            f"{what}: images are {shapes.describe(images)}; expected uint8, or floating point in 0..1, "
            "(N, height, width) or (N, height, width, 1 to 4 channels)"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise UserError(
            f"{what}: labels are {shapes.describe(labels)}; expected whole numbers (N,) or (N, 1)"
        )
    if len(labels) != len(images) or not len(images):
        raise UserError(f"{what}: {len(images)} images and {len(labels)} labels")
    if floating:
        low, high = images.min(), images.max()
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"{what}: images are {images.dtype} from {low} to {high}; floating point must be in "
                "0..1 (or uint8 in 0..255)"
            )
        images = np.rint(255 * images).astype(np.uint8)
    return images, labels


def _check_alike(train: np.ndarray, test: np.ndarray, name: str) -> None:
    if train.shape[1:] != test.shape[1:]:
        raise UserError(
            f"{name}: images of train are {list(train.shape[1:])}, those of test {list(test.shape[1:])}"
        )


def _resized(source: Source, side: int) -> Source:
    def part(examples: Examples) -> Examples:
        small = np.stack([resize(image, side) for image in examples["inputs"]])
        return {**examples, "inputs": small[..., 0] if small.shape[-1] == 1 else small}

    return source._replace(train=part(source.train), test=part(source.test))
