"""Image sets of a user's own, in every form in which they may come."""

import gzip

import numpy as np
from PIL import Image

NAMES = ("cat", "dog", "owl")


def arrays(colour=False, sizes=(12, 6), seed=0):
    """((images, labels) of train, the same of test), of three classes in turn, 6 x 5 pixels."""
    random = np.random.default_rng(seed)
    shape = (6, 5, 3) if colour else (6, 5)
    return tuple(
        (random.integers(0, 256, (size, *shape), np.uint8), np.arange(size) % 3) for size in sizes
    )


def write_npz(path, train, test, **more):
    np.savez(path, x_train=train[0], y_train=train[1], x_test=test[0], y_test=test[1], **more)
    return f"npz:{path}"


def idx_bytes(array):
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_idx(folder, train, test, prefix="", compressed=False, test_name="t10k"):
    folder.mkdir(exist_ok=True)
    for split, (images, labels) in (("train", train), (test_name, test)):
        for what, array in (("images", images), ("labels", labels)):
            axes = 3 if what == "images" else 1
            path = folder / f"{prefix}{split}-{what}-idx{axes}-ubyte{'.gz' * compressed}"
            content = idx_bytes(array)
            path.write_bytes(gzip.compress(content) if compressed else content)
    return f"idx:{folder}"


def write_folders(folder, train, test=None, names=NAMES):
    """FOLDER/train/CLASS/*.png and FOLDER/test/CLASS/*.png, or without a test set FOLDER/CLASS/*.png."""
    parts = {"": train} if test is None else {"train": train, "test": test}
    for split, (images, labels) in parts.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / names[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return f"images:{folder}"
