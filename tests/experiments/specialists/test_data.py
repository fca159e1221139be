"""The specialist study's examples: splits, views, pictures of classes, fingerprints."""

import image_sets
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tfds_sets import prepare_tiny

from distill_jax.errors import UserError
from experiments.specialists import glyphs
from experiments.specialists.config import get_config
from experiments.specialists.data import load_data, load_test

CLASSES, VIEWS = 5, 3
SPLITS = ("train", "seen", "validation", "test")


def config_of(**fields):
    config = get_config("smoke")
    config.data.update({"classes": CLASSES, "views": VIEWS, **fields})
    return config


@pytest.fixture(scope="module")
def embedded():
    """The glyphs of the first classes, as they are drawn."""
    splits = glyphs.load("embedded").splits
    return {
        name: {field: array[part["label"] < CLASSES] for field, array in part.items()}
        for name, part in splits.items()
    }


@pytest.fixture(scope="module")
def data():
    return load_data(config_of())


def test_held_out_typefaces_are_held_out(data):
    faces = {name: set(getattr(data, name)["typeface"].tolist()) for name in SPLITS}
    assert all(faces.values())
    assert faces["seen"] <= faces["train"]
    for name, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not faces[name] & faces[other]


def test_seen_glyphs_were_not_trained_on(data):
    trained, seen = (
        set(zip(part["typeface"].tolist(), part["label"].tolist(), strict=True))
        for part in (data.train, data.seen)
    )
    assert seen and not trained & seen


@pytest.mark.parametrize(("split", "views"), [*zip(SPLITS, (VIEWS, 2, 2, 1), strict=True)])
def test_views_of_every_glyph(data, embedded, split, views):
    made, drawn = getattr(data, split), embedded[split]
    assert len(made["id"]) == views * len(drawn["id"])
    assert len(np.unique(made["id"])) == len(made["id"])
    np.testing.assert_array_equal(np.unique(made["id"] // views), drawn["id"])
    assert made["inputs"].dtype == np.uint8 and made["inputs"].shape[1:] == (32, 32)
    # Each view is another one, and shows what its id says.
    assert len(np.unique(made["inputs"].reshape(len(made["id"]), -1), axis=0)) == len(made["id"])
    at = np.searchsorted(drawn["id"], made["id"] // views)
    for field in ("label", "typeface"):
        np.testing.assert_array_equal(made[field], drawn[field][at])


def test_all_classes_are_everywhere(data):
    assert data.num_classes == CLASSES
    for name in SPLITS:
        assert set(getattr(data, name)["label"].tolist()) == set(range(CLASSES))
    assert list(data.evaluation()) == ["test", "seen", "validation"]


def test_pictures_of_the_classes_are_glyphs_of_one_typeface(data, embedded):
    train = embedded["train"]
    assert data.class_images.shape == (CLASSES, 32, 32)
    faces = []
    for label, picture in enumerate(data.class_images):
        same = (train["inputs"] == picture).all(axis=(1, 2)) & (train["label"] == label)
        faces.append(set(train["typeface"][same].tolist()))
    assert set.intersection(*faces)


def test_without_distortion_glyphs_are_as_drawn(embedded):
    plain = load_data(config_of(difficulty=0.0, views=1))
    for name in SPLITS:
        for field in ("id", "inputs", "label"):
            np.testing.assert_array_equal(getattr(plain, name)[field], embedded[name][field])


def test_the_test_examples_alone_are_the_same(data):
    alone = load_test(config_of())
    for name, field in data.test.items():
        np.testing.assert_array_equal(alone[name], field)


def test_data_is_made_once(data):
    assert load_data(config_of()) is data


@pytest.mark.parametrize("change", [{"difficulty": 1.1}, {"seed": 1}, {"views": 2}, {"classes": 4}])
def test_fingerprint_names_what_the_config_changes(data, change):
    assert load_data(config_of(**change)).fingerprint != data.fingerprint


def test_another_seed_makes_other_views_of_the_same_glyphs(data):
    other = load_data(config_of(seed=1))
    np.testing.assert_array_equal(other.test["id"], data.test["id"])
    changed = (other.test["inputs"] != data.test["inputs"]).any(axis=(1, 2))
    assert changed.all()
    np.testing.assert_array_equal(other.class_images, data.class_images)


@pytest.mark.parametrize("classes", [-1, 1001])
def test_a_number_of_classes_that_there_is_not(classes):
    with pytest.raises(UserError, match=rf"data\.classes is {classes}, but there are 1000 classes"):
        load_data(config_of(classes=classes))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The data_dir of a TFDS set of 40 and 8 images, of which each is another grey."""
    path = tmp_path_factory.mktemp("tfds")
    images = [np.full((8, 8), grey, np.uint8) for grey in range(48)]
    labels = [grey % 4 for grey in range(48)]
    prepare_tiny(
        path,
        {"train": (images[:40], labels[:40]), "test": (images[40:], labels[40:])},
        label_feature=tfds.features.ClassLabel(num_classes=4),
    )
    return str(path)


def of_tiny(data_dir, **fields):
    source = {"source": "tfds:tiny", "data_dir": data_dir, "difficulty": 0.0, "views": 1}
    return load_data(config_of(**{**source, "classes": 0, "validation": 0.2, **fields}))


def test_a_part_of_a_tfds_set_is_held_out(tiny):
    data = of_tiny(tiny)
    sizes = {name: len(getattr(data, name)["id"]) for name in SPLITS}
    assert sizes == {"train": 32, "seen": 0, "validation": 8, "test": 8}
    assert list(data.evaluation()) == ["test", "validation"]
    parts = [set(getattr(data, name)["inputs"][:, 0, 0].tolist()) for name in SPLITS]
    assert set.union(*parts) == set(range(48)) and sum(map(len, parts)) == 48
    np.testing.assert_array_equal(data.class_images[:, 0, 0] % 4, np.arange(4))
    other = of_tiny(tiny, seed=1)
    assert set(other.validation["id"].tolist()) != set(data.validation["id"].tolist())
    assert other.fingerprint != data.fingerprint


def test_views_of_an_image_set_and_the_names_of_its_classes(tmp_path):
    train, test = image_sets.arrays()
    source = image_sets.write_folders(tmp_path / "f", train, test)
    more = {"source": source, "classes": 0, "validation": 0.25}
    data = load_data(config_of(**more, views=2, difficulty=1.0))
    assert data.class_names == image_sets.NAMES
    assert {name: len(getattr(data, name)["id"]) for name in SPLITS} == {
        "train": 18, "seen": 0, "validation": 6, "test": 6,
    }  # fmt: skip
    for name in (f"{number}.png" for number in range(3, 12, 3)):
        (tmp_path / "f/train/cat" / name).unlink()  # one cat is left
    message = r"data\.validation is 0\.9, which holds out all examples of class cat "
    with pytest.raises(UserError, match=message):
        load_data(config_of(**{**more, "validation": 0.9, "seed": 5}))


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_nothing_held_out_or_nothing_left(tiny, share):
    with pytest.raises(
        UserError, match=rf"data\.validation is {share}, .* of 40 training examples"
    ):
        of_tiny(tiny, validation=share)
