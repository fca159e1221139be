"""Larger sets of distorted views."""

import numpy as np
import pytest

from distill_jax.data import augment
from distill_jax.data.images import load
from distill_jax.errors import UserError


def noise_images(count, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def examples(count, shape=(12, 12)):
    random = np.random.default_rng(1)
    return {
        "id": random.permutation(5 * count)[:count].astype(np.int32),
        "inputs": noise_images(count, shape),
        "label": random.integers(0, 7, count).astype(np.int32),
        "soft": random.random((count, 7), np.float32),
    }


def rows(data, index):
    return {name: field[index] for name, field in data.items()}


class TestViews:
    def test_fields(self):
        data = examples(37)
        made = augment.views(data, 3, 1.0, seed=0)
        assert made.keys() == data.keys()
        assert {name: x.dtype for name, x in made.items()} == {n: x.dtype for n, x in data.items()}
        assert made["inputs"].shape == (111, 12, 12)
        assert len(set(made["id"].tolist())) == 111
        for view in range(3):
            part = rows(made, slice(37 * view, 37 * view + 37))
            np.testing.assert_array_equal(part["id"], 3 * data["id"] + view)
            for name in ("label", "soft"):
                np.testing.assert_array_equal(part[name], data[name])

    def test_they_look_like_what_they_are_of(self):
        train = rows(load("embedded").train, slice(0, 300))
        made = augment.views(train, 1, 0.1, seed=0)["inputs"].reshape(300, -1).astype(np.float32)
        correlation = np.corrcoef(made, train["inputs"].reshape(300, -1))[:300, 300:]
        assert (correlation.argmax(axis=1) == np.arange(300)).mean() > 0.98

    @pytest.mark.parametrize("shape", [(12, 12), (8, 10, 3)])
    def test_a_view_depends_on_seed_id_and_number_alone(self, shape):
        data = examples(300, shape)
        whole = augment.views(data, 2, 1.0, seed=4, batch_size=37)
        some = np.random.default_rng(2).permutation(300)[:37]
        part = augment.views(rows(data, some), 2, 1.0, seed=4)
        alone = augment.views(rows(data, some[:1]), 2, 1.0, seed=4)
        expected = rows(whole, np.concatenate([some, 300 + some]))
        for name in whole:
            np.testing.assert_array_equal(part[name], expected[name])
            np.testing.assert_array_equal(alone[name], expected[name][[0, 37]])

    def test_other_seeds_ids_and_views_differ(self):
        data = examples(37)
        data["inputs"][:] = data["inputs"][0]
        made = [augment.views(data, 2, 1.0, seed)["inputs"] for seed in (0, 1)]
        assert len({image.tobytes() for images in made for image in images}) == 2 * 2 * 37

    def test_difficulty_0_gives_the_examples(self):
        data = examples(5)
        same = augment.views(data, 1, 0.0, seed=0)
        assert same.keys() == data.keys()
        assert all(same[name] is data[name] for name in data)

    def test_ids_up_to_the_last_of_int32(self):
        data = examples(37)
        data["id"][0] = 2**30 - 1
        assert augment.views(data, 2, 1.0, seed=0)["id"].max() == 2**31 - 1
        with pytest.raises(UserError, match="3 views of an example with id 1073741823 need ids"):
            augment.views(data, 3, 1.0, seed=0)

    @pytest.mark.parametrize(
        ("count", "difficulty", "message"),
        [
            (0, 1.0, "views must be at least 1, .*not 0"),
            (2, 0.0, "and 1 at difficulty 0, not 2"),
            (1, -0.1, "must be 0 or more, not -0.1"),
            (1, float("nan"), "must be 0 or more, not nan"),
        ],
    )
    def test_mistakes(self, count, difficulty, message):
        with pytest.raises(UserError, match=message):
            augment.views(examples(2), count, difficulty, seed=0)

    @pytest.mark.parametrize("field", ["teacher_logits", "teacher_ids"])
    def test_cached_soft_targets_are_refused(self, field):
        data = {**examples(2), field: np.zeros((2, 3), np.float32)}
        assert augment.views(data, 1, 0.0, seed=0) is data
        with pytest.raises(UserError, match="cached soft targets can't be joined to distorted"):
            augment.views(data, 1, 1.0, seed=0)
