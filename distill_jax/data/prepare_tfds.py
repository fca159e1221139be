"""Prepares MNIST in TFDS form from the embedded files, without TensorFlow and without a network.

    python -m distill_jax.data.prepare_tfds --data_dir=DIR

The result can be read by `tfds.data_source("mnist", data_dir=DIR, download=False)` and by
`distill_jax.data.images.load("tfds:mnist", DIR)`. TFDS's own preparation needs TensorFlow.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import flags
from PIL import Image
from tensorflow_datasets.image_classification import mnist as stock

from distill_jax import files
from distill_jax.command import run
from distill_jax.data import images
from distill_jax.errors import UserError

_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "TFDS's data_dir; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."
)

_FORMAT = tfds.core.FileFormat.ARRAY_RECORD

# Not registered, so that `tfds.builder("mnist")` stays the stock builder.
with tfds.core.registered.skip_registration():

    class _EmbeddedMnist(stock.MNIST):
        """The stock builder (its version, features and keys) over the embedded files."""

        name = "mnist"

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
            del dl_manager  # Nothing is downloaded.
            source = images.load("embedded")
            return {
                "train": self._generate_examples(source.train),
                "test": self._generate_examples(source.test),
            }

        def _generate_examples(
            self, examples: images.Examples
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            # The key is the index within the split, as in the stock builder. TFDS orders examples
            # on disk by a hash of split and key.
            pairs = zip(examples["inputs"], examples["label"], strict=True)
            for index, (image, label) in enumerate(pairs):
                # TFDS encodes a pillow image with pillow, but an array with TensorFlow.
                yield index, {"image": Image.fromarray(image), "label": int(label)}


def prepare(data_dir: str | None = None) -> Path:
    """Writes MNIST for TFDS, about 25 MB; does nothing if it is there already.

    Args:
        data_dir: TFDS's data_dir; None for its default.

    Returns:
        The folder of the prepared set.

    Raises:
        UserError: if the folder has the set in a format without random access.
    """
    if data_dir is not None:
        files.check_writable(files.local_path(data_dir), "--data_dir")
    builder = _EmbeddedMnist(data_dir=data_dir and str(files.local_path(data_dir)))
    if builder.is_prepared() and _FORMAT not in builder.info.available_file_formats():
        raise UserError(
            f"{builder.data_dir} holds the set as {builder.info.file_format.value}: "
            "delete that folder or name another --data_dir"
        )
    builder.download_and_prepare(file_format=_FORMAT)
    return Path(builder.data_dir)


def main() -> None:
    """Runs the command."""
    print(f"prepared {prepare(_DATA_DIR.value)}")


if __name__ == "__main__":
    run(main)
