"""Sets that people bring: npz files, idx files, folders of images, arrays. All give the same."""

import gzip
import shutil

import numpy as np
import pytest
import tiny
from image_sets import (
    NAMES,
    arrays,
    idx_bytes,
    write_folders,
    write_idx,
    write_npz,
)
from PIL import Image

from distill_jax import soft_targets
from distill_jax.data import image_folders, images, records
from distill_jax.errors import UserError

TRAIN, TEST = arrays()


def pairs(source):
    return [(part["inputs"], part["label"]) for part in (source.train, source.test)]


def rows(inputs, labels):
    return sorted(
        (image.tobytes(), int(label)) for image, label in zip(inputs, labels, strict=True)
    )


@pytest.mark.parametrize("colour", [False, True])
def test_every_form_gives_the_same(tmp_path, colour):
    written = arrays(colour)
    folders = images.load(write_folders(tmp_path / "folders", *written))
    assert images.count(folders.name) == (3, 12, 6)
    assert [rows(*pair) for pair in pairs(folders)] == [rows(*pair) for pair in written]
    assert (folders.class_names, folders.num_classes) == (NAMES, 3)
    train, test = pairs(folders)  # in the order of folders, which is that of no list of names
    assert train[1].tolist() != sorted(train[1].tolist())
    np.savez(
        tmp_path / "b.npz",
        train_images=train[0],
        train_labels=train[1][:, None],
        test_images=test[0],
        test_labels=test[1][:, None],
        val_images=0,
        class_names=np.array(NAMES),
    )
    floats = [(inputs / 255, labels) for inputs, labels in (train, test)]
    for source in (
        images.load(write_npz(tmp_path / "a.npz", train, test)),
        images.load(f"npz:{tmp_path / 'b.npz'}"),
        images.load(write_npz(tmp_path / "c.npz", *floats)),
        images.load(write_idx(tmp_path / "plain", train, test)),
        images.load(write_idx(tmp_path / "gz", train, test, "emnist-letters-", True, "test")),
        images.from_arrays(train, test, NAMES),
    ):
        assert source.num_classes == 3 and source.class_names in ((), NAMES)
        if source.name != "arrays":
            assert images.count(source.name) == (3, 12, 6)
        for split in ("train", "test"):
            found, expected = getattr(source, split), getattr(folders, split)
            tiny.assert_equal(found, expected)
            assert {k: v.dtype for k, v in found.items()} == {
                k: v.dtype for k, v in expected.items()
            }
    assert folders.test["id"].tolist() == list(range(12, 18))


def test_every_form_is_resized_alike(tmp_path):
    folders = images.load(write_folders(tmp_path, TRAIN, TEST), side=3)
    assert folders.train["inputs"].shape == (12, 3, 3)
    whole = images.load(f"images:{tmp_path}")
    npz = images.load(write_npz(tmp_path / "a.npz", *pairs(whole)), side=3)
    tiny.assert_equal(npz.train, folders.train)


def test_folders_are_read_by_number_as_they_are_whole(tmp_path):
    source = write_folders(tmp_path, TRAIN, TEST)
    whole, opened = images.load(source), images.open_set(source)
    assert (opened.num_classes, opened.class_names) == (3, NAMES)
    numbers = np.array([7, 0, 11, 7])
    found = opened.train.read(numbers)
    tiny.assert_equal(found, {name: field[numbers] for name, field in whole.train.items()})
    tiny.assert_equal(opened.test.read(np.arange(6)), whole.test)
    digests = soft_targets.digests(found["inputs"])
    np.testing.assert_array_equal(digests, soft_targets.digests(whole.train["inputs"])[numbers])
    with pytest.raises(UserError, match=r"npz:x is read whole: only images: and tfds: sets"):
        images.open_set("npz:x")


def test_a_share_of_each_class_is_held_out(tmp_path, capsys):
    source = write_folders(tmp_path, TRAIN)
    first, again, other = (images.load(source, test_share=0.25, seed=seed) for seed in (0, 0, 1))
    tiny.assert_equal(first.test, again.test)
    assert np.bincount(first.test["label"]).tolist() == [1, 1, 1]
    assert rows(*pairs(first)[1]) != rows(*pairs(other)[1])
    both = rows(*map(np.concatenate, zip(*pairs(first), strict=True)))
    assert both == rows(*TRAIN)
    said = capsys.readouterr().out
    assert said.count("3 of 12 examples, 25 % of each class, drawn by seed 0") == 1
    # Each class keeps an image to learn from.
    assert len(images.load(source, test_share=0.99).train["id"]) == 3
    with pytest.raises(UserError, match=r"data\.test_share is 0\.01, which is no example of any"):
        images.load(source, test_share=0.01)


@pytest.mark.parametrize("keys", [("x", "y"), ("images", "labels")])
def test_arrays_without_a_test_set(tmp_path, keys):
    np.savez(tmp_path / "a.npz", **dict(zip(keys, TRAIN, strict=True)))
    source = images.load(f"npz:{tmp_path / 'a.npz'}", test_share=0.25, seed=3)
    assert np.bincount(source.test["label"]).tolist() == [1, 1, 1]
    assert rows(*map(np.concatenate, zip(*pairs(source), strict=True))) == rows(*TRAIN)
    tiny.assert_equal(images.from_arrays(TRAIN, test_share=0.25, seed=3).test, source.test)
    assert images.count(source.name, test_share=0.25) == (3, 9, 3)
    with pytest.raises(UserError, match=r"a\.npz has no test set, and data\.test_share is 0: set"):
        images.check_source(source.name)


def test_names_of_the_splits_and_files_that_are_no_images(tmp_path, capsys):
    write_folders(tmp_path, TRAIN, TEST)
    expected = images.load(f"images:{tmp_path}")
    (tmp_path / "test").rename(tmp_path / "Validation")
    (tmp_path / "train").rename(tmp_path / "Training")
    (tmp_path / "Training/owl/notes.txt").touch()
    (tmp_path / "Training/labels.csv").touch()
    (tmp_path / "Training/owl/.DS_Store").touch()
    (tmp_path / "Training/.cache").mkdir()
    inner = tmp_path / "Validation/owl/images"
    inner.mkdir()
    for path in (tmp_path / "Validation/owl").glob("*.png"):
        path.rename(inner / f"{path.stem}.PNG")
    found = images.load(f"images:{tmp_path}")
    assert rows(*pairs(found)[1]) == rows(*pairs(expected)[1])
    tiny.assert_equal(found.train, expected.train)
    images.load(f"images:{tmp_path}")
    assert capsys.readouterr().out.count("2 other files are not read") == 1


def save(folder, image, name="0.png", **options):
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)


def read_one(tmp_path, image, name="0.png", other=None, **options):
    """An image as it is read, beside one of another class."""
    for split in ("train", "test"):
        save(tmp_path / split / "a", image, name, **options)
        save(tmp_path / split / "b", other or image, name, **options)
    source = images.load(f"images:{tmp_path}")
    return source.train["inputs"][source.train["label"].tolist().index(0)]


def test_kinds_of_images(tmp_path):
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    as_image = Image.fromarray(grey)
    np.testing.assert_array_equal(read_one(tmp_path / "1", as_image), grey)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_one(tmp_path / "2", deep), grey)
    bits = Image.fromarray(grey > 150)
    assert read_one(tmp_path / "3", bits).tolist() == [[0, 0], [255, 255]]
    colour = np.stack([grey, grey // 2, grey // 3], axis=-1)
    np.testing.assert_array_equal(
        read_one(tmp_path / "4", as_image, other=Image.fromarray(colour)),
        grey[..., None] * [1, 1, 1],
    )
    palette = Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(read_one(tmp_path / "5", palette), colour)
    # What is transparent shows white, whatever colour it has.
    for number, mode in enumerate(("LA", "RGBA")):
        ink = Image.fromarray(colour).convert(mode)
        ink.putalpha(Image.fromarray(np.array([[255, 0], [255, 0]], np.uint8)))
        found = read_one(tmp_path / f"6{number}", ink)
        assert (found[:, 1] == 255).all() and (found[0, 0] == 0).all()
        assert found.ndim == len(mode) - (mode == "RGBA")


def test_a_photograph_that_was_taken_upright(tmp_path):
    wide = np.zeros((8, 16), np.uint8)
    wide[:, :8] = 255
    exif = Image.Exif()
    exif[image_folders._ORIENTATION] = 6  # to be shown turned to the right: its left is the top
    for name in ("0.jpg", "0.png"):
        found = read_one(tmp_path / name, Image.fromarray(wide), name, exif=exif.tobytes())
        assert found.shape == (16, 8)
        assert found[:6].min() > 240 and found[-6:].max() < 15


def test_labels_that_are_not_0_to_the_number_of_classes(tmp_path, capsys):
    train, test = ((inputs, 5 * labels + 1) for inputs, labels in (TRAIN, TEST))
    source = images.load(write_idx(tmp_path, train, test))
    assert (source.num_classes, source.class_names) == (3, ("1", "6", "11"))
    tiny.assert_equal(source.train["label"], TRAIN[1])
    tiny.assert_equal(source.test["label"], TEST[1])
    assert "the 3 labels 1 to 11 are numbered 0..2 in their order" in capsys.readouterr().out


def test_what_names_the_content(tmp_path):
    """Any change is noticed before a run continues; what isn't read may change."""
    sources = {
        "npz": (write_npz(tmp_path / "a.npz", TRAIN, TEST), tmp_path / "a.npz"),
        "idx": (write_idx(tmp_path / "idx", TRAIN, TEST), tmp_path / "idx/t10k-labels-idx1-ubyte"),
        "images": (write_folders(tmp_path / "f", TRAIN, TEST), tmp_path / "f/test/owl/2.png"),
    }
    other = arrays(seed=1)
    for source, path in sources.values():
        before = images.check_source(source)
        (tmp_path / "beside").touch()
        (path.parent / "notes.txt").touch()
        assert before and images.check_source(source) == before
        if path.suffix == ".npz":
            write_npz(path, other[0], TEST)
        elif path.suffix == ".png":
            Image.fromarray(TEST[0][0]).save(path)
        else:
            path.write_bytes(path.read_bytes()[:-1] + b"\0")
        assert images.check_source(source) != before


def test_a_change_within_a_large_idx_file_is_noticed(tmp_path):
    large = np.zeros((400, 30, 30), np.uint8), np.arange(400) % 3
    source = write_idx(tmp_path, large, TEST)
    before = images.check_source(source)
    large[0][200] = 1
    write_idx(tmp_path, large, TEST)
    assert images.check_source(source) != before


def change(position, array):
    """A test set or a train set in which images (0) or labels (1) are others."""
    return tuple(array if place == position else part for place, part in enumerate(TRAIN))


BAD_ARRAYS = [
    (
        change(0, TRAIN[0].astype(np.int64)),
        r"train: images are int64 \(12, 6, 5\); expected uint8, or",
    ),
    (change(0, TRAIN[0].reshape(12, 30)), r"images are uint8 \(12, 30\)"),
    (change(0, np.zeros((12, 3, 6, 5), np.uint8)), r"\(N, height, width, 1 to 4 channels\)"),
    (
        change(0, TRAIN[0].astype(np.float32)),
        r"images are float32 from 0\.0 to 25\d\.0; floating point",
    ),
    (change(0, np.full((12, 6, 5), np.nan)), "images are float64 from nan to nan"),
    (change(0, TRAIN[0][:5]), "train: 5 images and 12 labels"),
    (change(0, TRAIN[0][:, :5]), r"images of train are \[5, 5\], those of test \[6, 5\]"),
    (change(1, np.eye(3)[TRAIN[1]]), r"labels are float64 \(12, 3\); expected whole numbers"),
    (change(1, TRAIN[1] - 1), "train has labels below 0"),
    (change(1, TRAIN[1] * 0), "train has no example of class 1, test has"),
    ((TRAIN[0][:0], TRAIN[1][:0]), "train: 0 images and 0 labels"),
]


@pytest.mark.parametrize(("train", "message"), BAD_ARRAYS)
def test_arrays_that_can_not_be_trained_on(train, message):
    with pytest.raises(UserError, match=f"^mine.*{message}"):
        images.from_arrays(train, TEST, name="mine")


def test_classes_that_do_not_fit():
    one = (TRAIN[0], TRAIN[1] * 0)
    with pytest.raises(UserError, match="mine: there is 1 class; a net tells two or more apart"):
        images.from_arrays(one, one, name="mine")
    with pytest.raises(UserError, match=r"mine, train: 4 of 12 labels are outside 0\.\.1"):
        images.from_arrays(TRAIN, TEST, ("a", "b"), name="mine")
    large = (TRAIN[0], TRAIN[1] + 2**32)
    with pytest.raises(
        UserError, match=r"12 of 12 labels are outside 0\.\.2, the first is 4294967296"
    ):
        images.from_arrays(large, TEST, NAMES)


def bad_npz(folder, kind):
    path = folder / "a.npz"
    source = write_npz(path, TRAIN, TEST)
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "text":
        path.write_text("x_train")
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, TRAIN[0])
    elif kind == "pickled":
        np.savez(path, x_train=TRAIN[0], y_train=TRAIN[1].astype(object), x_test=0, y_test=0)
    elif kind == "damaged":
        content = bytearray(path.read_bytes())
        content[200] ^= 0xFF
        path.write_bytes(content)
    elif kind == "keys":
        np.savez(path, x_train=TRAIN[0], y_train=TRAIN[1], images=TEST[0])
    return source


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "a.npz: no such file"),
        ("cut", "a.npz is no npz file of arrays"),
        ("text", "a.npz is no npz file of arrays$"),
        ("npy", "a.npz has one array; expected an npz file"),
        ("pickled", "array y_train holds pickled Python objects, which are not read"),
        ("damaged", "array x_train can't be read .*CRC"),
        ("keys", r"has no array x_test; expected x_train, .* found images, x_train, y_train"),
    ],
)
def test_npz_files_that_can_not_be_read(tmp_path, kind, message):
    source = bad_npz(tmp_path, kind)
    with pytest.raises(UserError, match=message) as caught:
        images.load(source)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_idx_files_that_can_not_be_read(tmp_path):
    source = write_idx(tmp_path, TRAIN, TEST)
    path = tmp_path / "train-images-idx3-ubyte"
    content = path.read_bytes()
    for wrong, message in (
        (b"", f"{path} is no idx file of bytes: it begins with nothing"),
        (b"\0\0\x0d" + content[3:], f"{path} is no idx file of bytes: it begins with 00 00 0d 03"),
        (gzip.compress(content), "begins with 1f 8b 08 "),
        (content[:-1], rf"{path} has 359 bytes of data; \[12, 6, 5\] are 360"),
        (idx_bytes(TRAIN[0][:11]), "11 images and 12 labels"),
        (idx_bytes(TRAIN[1]), r"images are uint8 \(12,\)"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=message):
            images.load(source)
    path.unlink()
    zipped = path.with_name(f"{path.name}.gz")
    zipped.write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(UserError, match=f"{zipped} can't be read: Compressed file ended before"):
        images.load(source)
    zipped.unlink()
    with pytest.raises(UserError, match="no file with the images of train; expected train-images"):
        images.load(source)
    with pytest.raises(UserError, match="there is no folder"):
        images.load(f"idx:{tmp_path}/none/at")


def test_one_of_several_idx_sets(tmp_path):
    for prefix in ("emnist-letters-", "emnist-digits-"):
        write_idx(tmp_path, TRAIN, TEST, prefix)
    with pytest.raises(
        UserError, match=f"2 sets; name one: idx:{tmp_path}/emnist-digits, idx:{tmp_path}/emnist-l"
    ):
        images.load(f"idx:{tmp_path}")
    assert images.load(f"idx:{tmp_path}/emnist-letters").num_classes == 3


def test_folders_that_can_not_be_read(tmp_path):
    source = write_folders(tmp_path, TRAIN, TEST)

    def message(**more):
        with pytest.raises(UserError) as caught:
            images.load(source, **more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert message(test_share=0.2).endswith(f"{source} has a test set: set it to 0")
    (tmp_path / "train/new").mkdir()
    assert message().startswith(f"{tmp_path / 'train/new'}: a class without images (.png, ")
    (tmp_path / "train/new").rmdir()
    (tmp_path / "train/cat/loop").symlink_to(tmp_path / "train/cat")
    assert message().endswith(
        f"/cat/loop links to a folder that is in {tmp_path}/train/cat already"
    )
    (tmp_path / "train/cat/loop").unlink()
    path = tmp_path / "train/cat/0.png"
    content = path.read_bytes()
    Image.fromarray(TRAIN[0][0][:5]).save(path)
    said = message()
    assert "images differ in size: " in said and str(path) in said
    assert "[5, 5]" in said and "[6, 5]" in said and "data.side" in said
    assert images.load(source, side=4).train["inputs"].shape == (12, 4, 4)
    path.write_bytes(b"no image")
    assert message().startswith(f"{path} can't be read as PNG or JPEG (")
    path.write_bytes(content[:60])
    assert f"{path} is damaged (" in message()
    path.write_bytes(content)
    (tmp_path / "test/cat").rename(tmp_path / "test/fox")
    assert message() == f"{tmp_path / 'test/fox'}: train has no class 'fox'"
    shutil.rmtree(tmp_path / "test")
    assert f"{source} has no test set" in message() and "data.test_share" in message()
    (tmp_path / "test").mkdir()  # images whose classes a table says, perhaps
    (tmp_path / "test/0.png").touch()
    assert f"{source} has no test set" in message()
    for name in NAMES[1:]:
        shutil.rmtree(tmp_path / "train" / name)
    assert message() == f"{source}: there is 1 class; a net tells two or more apart"
    shutil.rmtree(tmp_path / "train/cat")
    assert message().startswith(f"{source}: the folder of training images has no folders in it")
    (tmp_path / "train").rmdir()
    shutil.rmtree(tmp_path / "test")
    assert message() == f"{tmp_path}: no folders in it; each class has a folder with its images"
    tmp_path.rmdir()
    assert message() == f"{source}: there is no such folder"


def test_a_file_that_changes_while_it_is_used_is_named(tmp_path):
    opened = images.open_set(write_folders(tmp_path, TRAIN, TEST))
    path = tmp_path / "train/cat/0.png"
    path.unlink()
    with pytest.raises(UserError, match=f"{path} can't be read"):
        opened.train.read(np.arange(12))
    Image.fromarray(TRAIN[0][0][:5]).save(path)
    with pytest.raises(
        UserError, match=rf"{path} has inputs uint8 \[5, 5\], .* all must be the same"
    ):
        records.read_all(opened.train)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("npz:", {}, "unknown data source 'npz:'"),
        ("npz:x", {"data_dir": "y"}, "data.data_dir is 'y', but npz:x says itself"),
        ("idx:x", {"test_share": 0.1}, "data.test_share is 0.1, but idx:x has a test set"),
        ("images:s3://a/b", {}, "not on a local file system"),
    ],
)
def test_what_a_source_has_not(name, more, message):
    with pytest.raises(UserError, match=message):
        images.load(name, **more)
