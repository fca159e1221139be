"""What the specialist study's stages leave for its figures, made up."""

import numpy as np

C = 24
FIGURES = [
    "table3",
    "comparison",
    "coverage",
    "clusters",
    "covariance",
    "gallery",
    "soft",
    "distilled",
]


def make_pictures(count, shape=(8, 8)):
    """Each of one brightness of its own, below white."""
    values = 10 * np.arange(1, count + 1)
    return np.broadcast_to(values.reshape(-1, *[1] * len(shape)), (count, *shape)).astype(np.uint8)


def make_clusters():
    """Class c is in cluster c % 3 alone, of which only the first has all of its S places filled."""
    central = np.arange(C).reshape(-1, 3).T.copy()
    central[1:, -2:] = C
    together = np.arange(C)[:, None] % 3 == np.arange(C) % 3
    scale = np.arange(1.0, C + 1)
    matrix = np.where(together, 0.5, -0.1) + 0.5 * np.eye(C)
    return {
        "sets": central.astype(np.int32),
        "central": central.astype(np.int32),
        "matrix": (matrix * np.outer(scale, scale)).astype(np.float32),
        "assignment": (np.arange(C) % 3).astype(np.int32),
        "class_images": make_pictures(C),
    }


def make_gallery(corrected=(True, False, True)):
    """In each the true class is 3: second before and first after, or the other way round."""
    right, wrong = [3, 9, 5, 6, 7], [8, 3, 5, 6, 7]
    count = len(corrected)
    return {
        "image": make_pictures(count) + np.uint8(5),
        "label": np.full(count, 3, np.int32),
        "before_class": np.array([wrong if one else right for one in corrected], np.int32),
        "after_class": np.array([right if one else wrong for one in corrected], np.int32),
        "before": np.tile(np.float32([0.5, 0.25, 0.125, 0.1, 0.004]), (count, 1)),
        "after": np.tile(np.float32([0.75, 0.2, 0.02, 0.01, 0.0]), (count, 1)),
        "corrected": np.array(corrected),
    }


def texts(artists):
    return [text.get_text() for text in artists]
