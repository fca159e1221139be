"""TFDS round trips without TensorFlow, and every mistake that a user can make with them."""

import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import hashing
from tfds_sets import grey, prepare_tiny

import distill_jax
from distill_jax.data import images, prepare_tfds, records, transfer
from distill_jax.errors import UserError

ROOT = Path(distill_jax.__file__).parents[1]


def python(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def embedded():
    """The first of the embedded examples: to prepare them all takes a quarter of a minute."""
    whole = images.load("embedded")
    parts = {"train": transfer.select(whole.train, np.arange(3000))}
    test = transfer.select(whole.test, np.arange(500))
    return whole._replace(**parts, test={**test, "id": np.arange(3000, 3500, dtype=np.int32)})


@pytest.fixture(scope="module")
def mnist_dir(embedded, tmp_path_factory):
    """A TFDS data_dir, prepared by what the command in the error message runs."""
    data_dir = tmp_path_factory.mktemp("tfds")
    with pytest.raises(UserError, match="not prepared") as caught:
        images.load("tfds:mnist", str(data_dir))
    command = shlex.split(str(caught.value).split("Prepare it by: ")[1])
    assert command == ["python", "-m", "distill_jax.data.prepare_tfds", f"--data_dir={data_dir}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "load", lambda name: embedded)
        assert prepare_tfds.prepare(str(data_dir)) == data_dir / "mnist" / "3.0.1"
    return data_dir


@pytest.fixture(scope="module")
def tfds_mnist(mnist_dir):
    return images.load("tfds:mnist", str(mnist_dir))


def rows(examples):
    """The examples as a sorted list, so that two orders of the same examples are equal."""
    images = examples["inputs"].reshape(len(examples["inputs"]), -1)
    return sorted(zip(map(bytes, images), examples["label"].tolist(), strict=True))


class TestTfdsMnist:
    def test_round_trip(self, tfds_mnist, embedded):
        assert (tfds_mnist.name, tfds_mnist.num_classes) == ("tfds:mnist", 10)
        for split in ("train", "test"):
            read, written = getattr(tfds_mnist, split), getattr(embedded, split)
            for key in ("id", "inputs", "label"):
                assert read[key].dtype == written[key].dtype
                assert read[key].shape == written[key].shape
            np.testing.assert_array_equal(read["id"], written["id"])
            assert rows(read) == rows(written)

    def test_order_can_be_recovered(self, tfds_mnist, embedded):
        for split in ("train", "test"):
            read, written = getattr(tfds_mnist, split), getattr(embedded, split)
            hasher = hashing.Hasher(split)
            order = sorted(range(len(written["id"])), key=hasher.hash_key)
            np.testing.assert_array_equal(read["inputs"], written["inputs"][order])
            np.testing.assert_array_equal(read["label"], written["label"][order])

    def test_stock_calls_read_it(self, mnist_dir, tfds_mnist):
        first_two = tfds.data_source("mnist", split="test[:2]", data_dir=mnist_dir, download=False)
        assert len(first_two) == 2
        assert first_two[1]["image"].shape == (28, 28, 1)
        np.testing.assert_array_equal(first_two[1]["image"][..., 0], tfds_mnist.test["inputs"][1])
        info = tfds.builder("mnist", data_dir=mnist_dir).info
        assert (str(info.version), info.splits["train"].num_examples) == ("3.0.1", 3000)

    def test_preparing_again_does_nothing(self, mnist_dir):
        files = sorted(mnist_dir.rglob("*array_record*"))
        before = [file.stat().st_mtime_ns for file in files]
        result = python("-m", "distill_jax.data.prepare_tfds", f"--data_dir={mnist_dir}")
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == f"prepared {mnist_dir / 'mnist' / '3.0.1'}"
        assert [file.stat().st_mtime_ns for file in files] == before

    def test_preparing_over_another_format_is_an_error(self, mnist_dir, tmp_path):
        folder = tmp_path / "mnist" / "3.0.1"
        folder.mkdir(parents=True)
        for name in ("dataset_info.json", "features.json"):
            text = (mnist_dir / "mnist" / "3.0.1" / name).read_text()
            (folder / name).write_text(text.replace('"array_record"', '"tfrecord"'))
        result = python("-m", "distill_jax.data.prepare_tfds", f"--data_dir={tmp_path}")
        assert result.returncode == 1
        assert f"{folder} holds the set as tfrecord" in result.stderr
        assert "Traceback" not in result.stderr

    def test_preparing_takes_no_arguments(self):
        result = python("-m", "distill_jax.data.prepare_tfds", "mnist")
        assert result.returncode == 1
        message = "error: unexpected argument 'mnist'; flags begin with --"
        assert result.stderr.strip() == message


class TestTfdsSets:
    def test_colour_images_and_validation_in_place_of_test(self, tmp_path):
        pictures = [np.full((4, 5, 3), value, np.uint8) for value in range(5)]
        prepare_tiny(
            tmp_path,
            {"train": (pictures[:3], [0, 1, 2]), "validation": (pictures[3:], [1, 0])},
            image_feature=tfds.features.Image(shape=(4, 5, 3)),
        )
        for name in ("tfds:tiny", "tfds:tiny:1.0.0"):
            source = images.load(name, str(tmp_path))
            assert (source.name, source.num_classes) == (name, 3)
            assert source.train["inputs"].shape == (3, 4, 5, 3)
            assert source.test["id"].tolist() == [3, 4]
            # A value of the images names the label that was stored with it.
            for examples in (source.train, source.test):
                expected = np.array([0, 1, 2, 1, 0])[examples["inputs"][:, 0, 0, 0]]
                np.testing.assert_array_equal(examples["label"], expected)

    @pytest.mark.parametrize("splits", [("test", "validation"), ("test", "val"), ("test",)])
    def test_unlabelled_splits_are_passed_over(self, tmp_path, splits):
        # The last one is taken as it is; the first is unlabelled.
        data = {"train": ([grey(4)], [0]), "test": ([grey(4, 1)] * 2, [-1, -1])}
        data |= {split: ([grey(4, 2)] * 3, [0, 1, 2]) for split in splits[1:]}
        prepare_tiny(tmp_path, data)
        if len(splits) == 1:
            with pytest.raises(UserError, match="test: 2 of 2 labels are outside"):
                images.load("tfds:tiny", str(tmp_path))
        else:
            source = images.load("tfds:tiny", str(tmp_path))
            assert source.test["inputs"][:, 0, 0].tolist() == [2, 2, 2]
            assert images.count("tfds:tiny", str(tmp_path)) == (3, 1, 3)
            assert sorted(source.test["label"].tolist()) == [0, 1, 2]

    def test_a_partly_labelled_test_split_is_not_passed_over(self, tmp_path):
        labelled = ([grey(4)], [0])
        data = {"train": labelled, "test": ([grey(4)] * 3, [-1, 1, -1]), "validation": labelled}
        prepare_tiny(tmp_path, data)
        with pytest.raises(UserError, match="test: 2 of 3 labels are outside"):
            images.load("tfds:tiny", str(tmp_path))

    def test_neither_test_nor_validation(self, tmp_path):
        prepare_tiny(tmp_path, {"train": ([grey(4)], [0]), "dev": ([grey(4)], [0])})
        with pytest.raises(UserError, match="this set has dev, train"):
            images.load("tfds:tiny", str(tmp_path))

    def test_no_train(self, tmp_path):
        prepare_tiny(tmp_path, {"test": ([grey(4)], [0])})
        with pytest.raises(UserError, match="this set has test"):
            images.load("tfds:tiny", str(tmp_path))

    def test_images_of_different_sizes(self, tmp_path):
        data = ([grey(4), grey(4), grey(6)], [0, 1, 2])
        prepare_tiny(tmp_path, {"train": ([grey(4)], [0]), "test": data})
        with pytest.raises(
            UserError, match=r"test: record \d, in .*\[\d, \d\], .* all must be the same"
        ) as caught:
            images.load("tfds:tiny", str(tmp_path))
        assert "data.side" in str(caught.value)
        assert images.load("tfds:tiny", str(tmp_path), side=4).test["inputs"].shape == (3, 4, 4)

    def test_label_that_is_not_a_class(self, tmp_path):
        data = {"train": ([grey(4)], [7]), "test": ([grey(4)], [7])}
        prepare_tiny(tmp_path, data, label_feature=tfds.features.Scalar(np.int64))
        with pytest.raises(UserError, match=r"this one has .*Image.*Scalar"):
            images.load("tfds:tiny", str(tmp_path))

    def test_labels_are_validated(self, tmp_path):
        # TFDS's own mark of an unknown label.
        prepare_tiny(
            tmp_path, {"train": ([grey(4)] * 2, [0, 1]), "test": ([grey(4)] * 2, [-1, -1])}
        )
        with pytest.raises(
            UserError, match=r"test: 2 of 2 labels are outside 0\.\.2, .*-1 at id 2"
        ):
            images.load("tfds:tiny", str(tmp_path))

    def test_sixteen_bit_images(self, tmp_path):
        data = ([np.full((4, 4), 1000, np.uint16)], [0])
        feature = tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16)
        prepare_tiny(tmp_path, {"train": data, "test": data}, image_feature=feature)
        with pytest.raises(UserError, match=r"image \(uint8\) .*dtype=uint16"):
            images.load("tfds:tiny", str(tmp_path))

    def test_no_random_access(self, tmp_path):
        data = ([grey(4)], [0])
        folder = prepare_tiny(tmp_path, {"train": data, "test": data})
        # TFDS writes tfrecord by TensorFlow only; the format stands in this file.
        info = folder / "dataset_info.json"
        info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
        with pytest.raises(UserError, match="tfrecord, which has no random access") as caught:
            images.load("tfds:tiny", str(tmp_path))
        assert str(folder) in str(caught.value)
        assert f"tfds build tiny --data_dir={tmp_path} --file_format=array_record" in str(
            caught.value
        )

    def test_damaged_and_missing_records(self, tmp_path):
        data = ([grey(4, value) for value in range(20)], [0] * 20)
        folder = prepare_tiny(tmp_path, {"train": data, "test": data})
        (records,) = folder.glob("*train*")
        content = bytearray(records.read_bytes())
        content[300] ^= 0xFF
        records.write_bytes(content)
        with pytest.raises(UserError, match=rf"train: record \d+, in {records}, can't be read"):
            images.load("tfds:tiny", str(tmp_path))
        records.unlink()
        with pytest.raises(UserError, match=rf"train: record \d+, in {records}, can't be read"):
            images.load("tfds:tiny", str(tmp_path))


def frame(height, width, value):
    """One colour in the square about the centre, white on the longer sides' ends."""
    side = min(height, width)
    image = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    image[top : top + side, left : left + side] = [value, 2 * value, 7]
    return image


class TestSide:
    def test_colour_images_of_many_sizes_and_classes(self, tmp_path):
        sizes = [(40, 40), (70, 33), (20, 91), (5, 5)]  # both larger and smaller than the side
        pictures = [frame(*sizes[label % 4], label) for label in range(120)]
        prepare_tiny(
            tmp_path,
            {"train": (pictures, range(120)), "test": (pictures[:7], range(7))},
            image_feature=tfds.features.Image(shape=(None, None, 3)),
            label_feature=tfds.features.ClassLabel(num_classes=120),
        )
        source = images.load("tfds:tiny", str(tmp_path), side=32)
        assert source.num_classes == 120
        assert source.train["inputs"].shape == (120, 32, 32, 3)
        assert source.train["inputs"].dtype == np.uint8
        assert source.test["id"].tolist() == list(range(120, 127))
        assert sorted(source.train["label"].tolist()) == list(range(120))
        for examples in (source.train, source.test):
            value = examples["label"]
            expected = np.stack([value, 2 * value, np.full_like(value, 7)], axis=-1)
            everywhere = np.broadcast_to(expected[:, None, None], examples["inputs"].shape)
            np.testing.assert_array_equal(examples["inputs"], everywhere)

    def test_shrinking_is_antialiased(self, tmp_path):
        # A checkerboard of single pixels: a half of white, not one or the other colour.
        board = np.uint8(255) * (np.indices((64, 64)).sum(0) % 2).astype(np.uint8)
        prepare_tiny(tmp_path, {"train": ([board], [0]), "test": ([board], [0])})
        image = images.load("tfds:tiny", str(tmp_path), side=8).train["inputs"]
        assert image.shape == (1, 8, 8)
        assert np.abs(image.astype(int) - 128).max() <= 2

    def test_images_of_that_size_are_left_as_they_are(self, tmp_path):
        pictures = np.random.default_rng(0).integers(0, 256, (5, 9, 9), np.uint8)
        prepare_tiny(tmp_path, {"train": (pictures, [0] * 5), "test": (pictures, [0] * 5)})
        kept, resized = (images.load("tfds:tiny", str(tmp_path), side=side) for side in (0, 9))
        np.testing.assert_array_equal(resized.train["inputs"], kept.train["inputs"])

    @pytest.mark.parametrize(("name", "side"), [("tfds:tiny", -1), ("embedded", 14)])
    def test_what_has_no_side(self, name, side):
        with pytest.raises(UserError, match=rf"data\.side must be 0 .* not {side} for {name}"):
            images.load(name, side=side)


def test_progress_of_a_long_read(tmp_path, monkeypatch, capsys):
    data = ([grey(4)] * 3, [0, 1, 2])
    prepare_tiny(tmp_path, {"train": data, "test": data})
    capsys.readouterr()
    images.load("tfds:tiny", str(tmp_path))
    assert "images read" not in capsys.readouterr().out
    monkeypatch.setattr(records, "_PROGRESS_SECONDS", 0)
    images.load("tfds:tiny", str(tmp_path))
    assert "tfds:tiny, test: images read: 3 of 3\n" in capsys.readouterr().out


def test_images_that_do_not_fit_the_memory():
    with pytest.raises(UserError, match=r"x, train: images \[1099511627776, .*data\.side"):
        records._allocate({"inputs": np.zeros((2**10, 2**10, 3), np.uint8)}, 2**40, "x, train")


class TestAbsentTfdsSets:
    @pytest.fixture(autouse=True)
    def no_network(self, monkeypatch):
        def connect(*args):
            pytest.fail("tried the network")

        monkeypatch.setattr(socket.socket, "connect", connect)
        monkeypatch.setattr(socket, "getaddrinfo", connect)

    def message(self, name, data_dir):
        start = time.monotonic()
        with pytest.raises(UserError) as caught:
            images.load(name, data_dir)
        assert time.monotonic() - start < 5
        assert "\n" not in str(caught.value)
        return str(caught.value)

    @pytest.mark.parametrize("name", ["mnist", "mnist:3.0.1", "mnist:9.9.9", "mnist/no_config"])
    def test_mnist(self, tmp_path, name):
        data_dir = str(tmp_path / "with space")
        command = f"python -m distill_jax.data.prepare_tfds --data_dir='{data_dir}'"
        assert self.message(f"tfds:{name}", data_dir).endswith(command)

    @pytest.mark.parametrize("name", ["cifar10", "emnist/balanced", "no_such_set", "cifar10:9.9.9"])
    def test_others(self, tmp_path, name):
        assert self.message(f"tfds:{name}", str(tmp_path)).endswith(
            f"pip install tensorflow && tfds build {name} --data_dir={tmp_path} "
            "--file_format=array_record"
        )

    def test_unknown_set_is_called_so(self, tmp_path):
        message = self.message("tfds:no_such_set", str(tmp_path))
        assert "Dataset no_such_set not found" in message

    def test_default_data_dir(self, tmp_path, monkeypatch):
        # TFDS reads the variable when it is imported.
        code = (
            "from distill_jax.data import images\n"
            "try: images.load('tfds:mnist')\n"
            "except ValueError as error: print(error)"
        )
        monkeypatch.setenv("TFDS_DATA_DIR", os.fspath(tmp_path))
        lines = python("-c", code).stdout.splitlines()
        assert len(lines) == 1
        assert str(tmp_path) in lines[0]
        assert lines[0].endswith("python -m distill_jax.data.prepare_tfds")


def test_tensorflow_is_not_imported(tmp_path):
    data = ([grey(4)], [0])
    prepare_tiny(tmp_path, {"train": data, "test": data})
    code = (
        "import sys\n"
        "from distill_jax.data import images\n"
        "images.load('embedded')\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"images.load('tfds:tiny', {str(tmp_path)!r})\n"
        "import distill_jax.data.prepare_tfds\n"
        "print('tensorflow' in sys.modules)"
    )
    result = python("-c", code)
    assert result.stdout == "False\n", result.stderr
