"""The embedded source, and what every source is checked for."""

import gzip

import numpy as np
import pytest

from distill_jax.data import images
from distill_jax.errors import UserError

FILES = sorted(images.MNIST_SHA256)


@pytest.fixture(scope="module")
def embedded():
    return images.load("embedded")


class TestEmbedded:
    def test_arrays(self, embedded):
        assert (embedded.name, embedded.num_classes) == ("embedded", 10)
        for examples, count, first_id in (
            (embedded.train, 60000, 0),
            (embedded.test, 10000, 60000),
        ):
            assert sorted(examples) == ["id", "inputs", "label"]
            assert examples["inputs"].shape == (count, 28, 28)
            assert examples["inputs"].dtype == np.uint8
            assert examples["label"].shape == (count,)
            assert examples["label"].dtype == np.int32
            assert examples["id"].dtype == np.int32
            np.testing.assert_array_equal(examples["id"], np.arange(first_id, first_id + count))

    def test_labels(self, embedded):
        assert embedded.train["label"][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
        assert embedded.test["label"][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
        train_counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert np.bincount(embedded.train["label"]).tolist() == train_counts
        test_counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
        assert np.bincount(embedded.test["label"]).tolist() == test_counts

    def test_images_are_upright_ink_on_black(self, embedded):
        images = embedded.train["inputs"]
        # The published mean and standard deviation of the training pixels.
        assert images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)
        assert images.std() / 255 == pytest.approx(0.3081, abs=5e-5)
        # A mean 7 has its bar above, and hardly any ink at the lower right.
        seven = images[embedded.train["label"] == 7].mean(axis=0)
        assert seven[:14].sum() > 1.1 * seven[14:].sum()
        assert seven[20:, 18:].sum() < 0.1 * seven[20:, :18].sum()

    def test_another_folder_gives_the_same(self, embedded, tmp_path):
        for name in FILES:
            # Compressed in another way: only the content is checked.
            content = gzip.decompress((images.EMBEDDED_DIR / name).read_bytes())
            (tmp_path / name).write_bytes(gzip.compress(content, compresslevel=0))
        again = images.load("embedded", str(tmp_path))
        for ours, theirs in ((again.train, embedded.train), (again.test, embedded.test)):
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


class TestDamagedFiles:
    @staticmethod
    def load_with(tmp_path, name, content):
        """Loads a folder in which one file has other content (None: is missing)."""
        for other in FILES:
            if other != name:
                (tmp_path / other).symlink_to(images.EMBEDDED_DIR / other)
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            images.load("embedded", str(tmp_path))
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / name}: expected ")
        assert images.MNIST_SHA256[name] in message
        return message.split("found ")[1]

    @pytest.mark.parametrize("name", FILES)
    def test_missing(self, tmp_path, name):
        assert self.load_with(tmp_path, name, None) == "no file"

    # Of 28,857 bytes: the magic number, the compressed data, the checksum at the end.
    @pytest.mark.parametrize("position", [0, 100, 10000, 28000, -8])
    def test_a_flipped_byte(self, tmp_path, position):
        name = "train-labels-idx1-ubyte.gz"
        content = bytearray((images.EMBEDDED_DIR / name).read_bytes())
        content[position] ^= 0xFF
        assert "cannot be read" in self.load_with(tmp_path, name, content)

    @pytest.mark.parametrize("length", [5, 1000, 28856])
    def test_truncated(self, tmp_path, length):
        name = "train-labels-idx1-ubyte.gz"
        content = (images.EMBEDDED_DIR / name).read_bytes()[:length]
        assert "cannot be read" in self.load_with(tmp_path, name, content)

    def test_empty(self, tmp_path):
        found = self.load_with(tmp_path, "train-labels-idx1-ubyte.gz", b"")
        assert found.startswith("0 bytes with e3b0c442")

    def test_valid_gzip_with_one_label_changed(self, tmp_path):
        name = "t10k-labels-idx1-ubyte.gz"
        content = bytearray(gzip.decompress((images.EMBEDDED_DIR / name).read_bytes()))
        content[-1] = (content[-1] + 1) % 10
        found = self.load_with(tmp_path, name, gzip.compress(content))
        assert found.startswith("10008 bytes with ")

    def test_a_folder_in_place_of_the_file(self, tmp_path):
        (tmp_path / "train-images-idx3-ubyte.gz").mkdir()
        with pytest.raises(UserError, match=r"cannot be read: .*directory"):
            images.load("embedded", str(tmp_path))


@pytest.mark.parametrize(
    "name", ["", "mnist", "Embedded", "embedded:x", "tfds:", "tfds:hf:x", "tfds"]
)
def test_unknown_source(name):
    with pytest.raises(UserError, match=r"unknown data source .*'embedded' .*'tfds:NAME") as caught:
        images.load(name)
    assert repr(name) in str(caught.value)


class TestValidate:
    @staticmethod
    def examples(**changes):
        arrays = {
            "id": np.arange(10, 14, dtype=np.int32),
            "inputs": np.zeros((4, 2, 2), np.uint8),
            "label": np.array([0, 1, 2, 0], np.int32),
        }
        return arrays | changes

    def test_good(self):
        images.validate(self.examples(), 3, "x")
        images.validate(self.examples(inputs=np.zeros((4, 2, 2, 3), np.float32)), 3, "x")
        images.validate(self.examples(soft=np.zeros((4, 3))), 3, "x")

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0, 3, 9, 0], r"x: 2 of 4 labels are outside 0\.\.2, the first is 3 at id 11"),
            ([0, 1, 2, -1], r"x: 1 of 4 labels are outside 0\.\.2, the first is -1 at id 13"),
            ([0.0, 1.0, 2.0, 0.0], "x: label must be an integer, found float64"),
        ],
    )
    def test_labels(self, labels, message):
        with pytest.raises(UserError, match=message):
            images.validate(self.examples(label=np.array(labels)), 3, "x")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("key", ["inputs", "soft"])
    def test_non_finite(self, key, value):
        array = np.zeros((4, 2, 2), np.float32)
        array[2, 1, 0] = array[3, 0, 0] = value
        with pytest.raises(UserError, match=f"x: {key} has NaN .* 2 of 4 .* first has id 12"):
            images.validate(self.examples(**{key: array}), 3, "x")

    @pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, bool])
    def test_dtype_of_inputs(self, dtype):
        inputs = np.zeros((4, 2, 2), dtype)
        with pytest.raises(UserError, match=f"uint8 or floating point, found {np.dtype(dtype)}"):
            images.validate(self.examples(inputs=inputs), 3, "x")

    def test_lengths(self):
        changed = self.examples(label=np.zeros(3, np.int32))
        with pytest.raises(
            UserError, match=r"x: .*one length, .*id \[4\], inputs \[4\], label \[3\]"
        ):
            images.validate(changed, 3, "x")

    def test_scalar_in_place_of_an_array(self):
        with pytest.raises(UserError, match=r"x: .*one length, .*soft \[\]"):
            images.validate(self.examples(soft=np.float32(1)), 3, "x")

    def test_no_examples(self):
        empty = {key: array[:0] for key, array in self.examples().items()}
        with pytest.raises(UserError, match="x: no examples"):
            images.validate(empty, 3, "x")

    def test_missing_array(self):
        changed = self.examples()
        del changed["label"]
        with pytest.raises(UserError, match=r"x: array label is missing; found \['id', 'inputs'\]"):
            images.validate(changed, 3, "x")
