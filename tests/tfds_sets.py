"""Small sets in TFDS's form, prepared without TensorFlow."""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

# Code that finds tensorflow, as if it were installed, and fails to import it.
WITHOUT_TENSORFLOW = """
import importlib.machinery, sys

class Refuses:
    def find_spec(name, path=None, target=None):
        if name == "tensorflow":
            return importlib.machinery.ModuleSpec(name, Refuses)
    def create_module(spec):
        raise ImportError("tensorflow was asked for")
    def exec_module(module):
        pass

sys.meta_path.insert(0, Refuses)
"""


def grey(size, value=0):
    return np.full((size, size), value, np.uint8)


def prepare_tiny(data_dir, splits, image_feature=None, label_feature=None, file_format=None):
    """Prepares the TFDS set "tiny" of splits {name: (images, labels)}; TFDS has no code for it."""
    features = {
        "image": image_feature or tfds.features.Image(shape=(None, None, 1)),
        "label": label_feature or tfds.features.ClassLabel(num_classes=3),
    }

    with tfds.core.registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            name = "tiny"
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(*data) for name, data in splits.items()}

            def _generate_examples(self, images, labels):
                for key, (image, label) in enumerate(zip(images, labels, strict=True)):
                    yield key, {"image": Image.fromarray(image), "label": label}

    Tiny(data_dir=data_dir).download_and_prepare(file_format=file_format or "array_record")
    return data_dir / "tiny" / "1.0.0"
