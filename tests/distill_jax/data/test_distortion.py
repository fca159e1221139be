"""Distortion against SciPy, and by what it does to simple figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from distill_jax.data import augment, distortion
from distill_jax.data.images import load
from distill_jax.errors import UserError

draw = jax.jit(jax.vmap(distortion._draw, (0, None)))
move = jax.jit(distortion._move)
SHAPES = [(32, 32), (17, 24), (9, 6, 3)]


def distort_eagerly(images, key, difficulty):
    return distortion.distort(images, jax.random.split(key, len(images)), difficulty)


distort = jax.jit(distort_eagerly)


def noise_images(count, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def disc(side, radius, value):
    """A disc of one value about the centre."""
    y, x = np.indices((side, side)) - (side - 1) / 2
    return np.where(x**2 + y**2 <= radius**2, value, 0).astype(np.uint8)


def distorted_copies(image, count, difficulty, key):
    copies = np.repeat(image[None], count, axis=0)
    return np.asarray(distort(copies, key, difficulty)).astype(np.float64)


def draw_amounts(difficulty, count=20000):
    """Each amount `[count]`."""
    return draw(jax.random.split(jax.random.key(5), count), jnp.float32(difficulty))


class TestDistort:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_shapes_and_difficulty_0(self, key, shape):
        images = noise_images(64, shape)
        np.testing.assert_array_equal(distort(images, key, 0.0), images)
        distorted = distort(images, key, 1.0)
        assert (distorted.shape, distorted.dtype) == (images.shape, jnp.uint8)
        assert (np.asarray(distorted) != images).reshape(64, -1).mean(axis=1).min() > 0.5

    def test_jit_equals_eager(self, key):
        images = jnp.asarray(noise_images(64, (32, 32)))
        np.testing.assert_array_equal(distort_eagerly(images, key, 0), images)
        jitted = np.asarray(distort(images, key, 1.0)).astype(int)
        difference = np.abs(jitted - np.asarray(distort_eagerly(images, key, 1.0)))
        # Rounding to a level may fall either way.
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3

    @pytest.mark.parametrize(
        "images",
        [
            np.zeros((2, 8, 8), np.float32),
            np.zeros((8, 8), np.uint8),
            np.zeros((1, 2, 8, 8, 3), np.uint8),
        ],
    )
    def test_images_that_it_does_not_take(self, key, images):
        message = r"must be uint8 \[B, H, W\] or .*found|(images|inputs) is .*expected int [BN] H W"
        with pytest.raises(UserError, match=message):
            distort_eagerly(jnp.asarray(images), key, 1.0)
        with pytest.raises(UserError, match=message):
            distortion.distort_handwriting(jnp.asarray(images), jax.random.split(key, len(images)))
        with pytest.raises(UserError, match=message):
            data = {"id": np.arange(len(images), dtype=np.int32), "inputs": images}
            augment.views(data, 1, 1.0, seed=0)


class TestAgainstScipy:
    """Each part in float64, for the amounts that were drawn."""

    @pytest.mark.parametrize("difficulty", [0.4, 1.0, 2.0])
    @pytest.mark.parametrize("shape", [(32, 32), (21, 30)])
    def test_move(self, difficulty, shape):
        planes = noise_images(2, shape)
        drawn = draw_amounts(difficulty)
        for i in range(6):
            amounts = distortion._Amounts(*(amount[i] for amount in drawn))
            rotation, shear, stretch, scale, right, down = (float(x) for x in amounts[:6])
            cos, sin = np.cos(rotation), np.sin(rotation)
            # In rows and columns: y before x.
            turn = np.array([[cos, sin], [-sin, cos]])
            slant = np.array([[1.0, 0.0], [shear, 1.0]])
            matrix = turn @ slant @ np.diag([stretch / scale, 1 / (stretch * scale)])
            centre = (np.array(shape) - 1) / 2
            offset = centre - matrix @ (centre + np.array(shape) * [down, right])
            for plane, moved in zip(planes, move(planes, amounts), strict=True):
                expected = scipy.ndimage.affine_transform(
                    plane.astype(np.float64), matrix, offset, order=1, mode="grid-constant"
                )
                np.testing.assert_allclose(moved, expected, atol=0.02)

    def test_smooth(self):
        planes = noise_images(3, (7, 9)).astype(np.float32)
        kernel = np.outer([1, 2, 1], [1, 2, 1])[None] / 16
        expected = scipy.ndimage.convolve(planes.astype(np.float64), kernel, mode="constant")
        np.testing.assert_allclose(distortion._smooth(jnp.asarray(planes)), expected, atol=1e-4)


@pytest.mark.parametrize("difficulty", [0.5, 1.0, 1.4, 2.0])
def test_ranges(difficulty):
    """The table of the module: that the ranges are filled, and not left."""
    drawn = {name: np.asarray(x) for name, x in draw_amounts(difficulty)._asdict().items()}
    drawn["stretch"] = np.log(drawn["stretch"])
    d = difficulty
    ranges = {
        "rotation": (-0.26 * d, 0.26 * d),
        "shear": (-0.25 * d, 0.25 * d),
        "stretch": (-0.17 * d, 0.17 * d),
        "scale": ((18 / 28) ** d, (29 / 28) ** d),
        "shift_x": (-3 / 32 * d, 3 / 32 * d),
        "shift_y": (-3 / 32 * d, 3 / 32 * d),
        "blur": (0.0, min(0.8 * d, 1.0)),
        "contrast": (0.5**d, 1.0),
        "noise": (0.03 * d, 0.15 * d),
    }
    assert ranges.keys() == drawn.keys()
    uniform = []
    for name, (low, high) in ranges.items():
        share = (drawn[name] - low) / (high - low)
        assert -1e-5 <= share.min() < 1e-3, name
        assert 1 - 1e-3 < share.max() <= 1 + 1e-5, name
        assert abs(share.mean() - 0.5) < 0.01, name
        assert abs(share.std() - 12**-0.5) < 0.01, name
        uniform.append(share)
    assert np.abs(np.corrcoef(uniform) - np.eye(len(uniform))).max() < 0.03  # independent


class TestFigures:
    def test_shift(self, key):
        # What is at the centre goes where the shift says, whatever else is done.
        images = distorted_copies(disc(65, 8, 255), 500, 1.0, key)
        ink = np.where(images > 110, images, 0)
        y, x = np.indices((65, 65)) - 32.0
        for axis in (x, y):
            shift = (ink * axis).sum(axis=(1, 2)) / ink.sum(axis=(1, 2))
            assert np.abs(shift).max() < 65 * 3 / 32 + 0.3
            assert shift.std() == pytest.approx(65 * 3 / 32 / 3**0.5, rel=0.1)
            assert abs(shift.mean()) < 0.4

    @pytest.mark.parametrize("difficulty", [0.3, 1.0])
    def test_scale(self, key, difficulty):
        # Rotation, shear and stretch keep the area.
        image = disc(65, 20, 255)
        images = distorted_copies(image, 500, difficulty, key)
        # Half of the faded disc; the noise is smoothed away.
        smooth = scipy.ndimage.uniform_filter(images, (0, 3, 3))
        white = np.median(smooth[:, 28:37, 28:37], axis=(1, 2))
        area = (smooth > white[:, None, None] / 2).sum(axis=(1, 2)) / (image > 0).sum()
        assert area.min() > (18 / 28) ** (2 * difficulty) * 0.93
        assert area.max() < (29 / 28) ** (2 * difficulty) * 1.07

    def test_contrast_and_noise(self, key):
        # The inside of a grey disc: neither moved, nor blurred, nor clipped.
        inside = distorted_copies(disc(65, 30, 128), 500, 1.0, key)[:, 26:39, 26:39]
        level, noise = inside.mean(axis=(1, 2)), inside.std(axis=(1, 2))
        assert 64 - 10 < level.min() < 70
        assert 122 < level.max() < 128 + 10
        assert level.mean() == pytest.approx(96, abs=3)
        assert 0.03 * 255 * 0.85 < noise.min() < 10
        assert 36 < noise.max() < 0.15 * 255 * 1.15
        assert noise.mean() == pytest.approx(0.09 * 255, rel=0.05)

    def test_digits_keep_most_of_their_ink(self):
        digits = np.pad(load("embedded").test["inputs"][:1000], [(0, 0), (2, 2), (2, 2)])
        moved = jax.jit(jax.vmap(distortion._move))(digits[:, None], draw_amounts(1.0, 1000))
        kept = np.asarray(moved).sum(axis=(1, 2, 3)) / digits.sum(axis=(1, 2))
        # The mean of the squared scale, 0.71, less what goes over the edges.
        assert kept.mean() == pytest.approx(0.71, abs=0.02)


class TestHandwriting:
    def test_an_image_that_is_bent_alone_moves_as_the_grid_says(self, key, monkeypatch):
        """Without the affine map: against SciPy, for the grid that was drawn."""
        still = dict.fromkeys(distortion._HANDWRITING, 0.0)
        monkeypatch.setattr(distortion, "_HANDWRITING", still)
        image = noise_images(1, (28, 28))[0]
        (bent,) = distortion.distort_handwriting(jnp.asarray(image[None]), key[None])
        grid = jax.random.normal(jax.random.split(key)[1], (2, 5, 5))
        right, down = 1.1 * np.asarray(jax.image.resize(grid, (2, 28, 28), "cubic"), np.float64)
        y, x = np.indices((28, 28))
        expected = scipy.ndimage.map_coordinates(
            image.astype(np.float64), [y + down, x + right], order=1, mode="grid-constant"
        )
        assert np.abs(np.asarray(bent, np.float64) - expected).max() < 0.53  # it is rounded
        assert (np.asarray(bent) != image).mean() > 0.5

    def test_amounts_stay_in_their_ranges(self, key):
        # A disc keeps its area but for scale and stretch, which keeps it, and the grid's part.
        image = disc(29, 8, 255)
        copies = jnp.asarray(np.repeat(image[None], 300, axis=0))
        keys = jax.random.split(key, 300)
        made = np.asarray(jax.jit(distortion.distort_handwriting)(copies, keys)).astype(np.float64)
        area = made.sum(axis=(1, 2)) / image.sum()
        assert 0.55 < area.min() < 0.85 and 1.15 < area.max() < 1.6
        y, x = np.indices((29, 29)) - 14.0
        for axis in (x, y):
            centre = (made * axis).sum(axis=(1, 2)) / made.sum(axis=(1, 2))
            assert abs(centre.mean()) < 0.3
            assert 1.0 < centre.std() < 2.5

    def test_numbered_views_are_functions_of_seed_id_and_number(self):
        views, other = augment.handwriting(2**31 - 1, 3), augment.handwriting(5, 4)
        images = jnp.asarray(noise_images(3, (12, 12)))
        ids, numbers = jnp.array([5, 9, 5]), jnp.array([0, 2**31 - 2, 1])
        made = np.asarray(views.make(images, ids, numbers))
        (again,) = np.asarray(views.make(images[1:2], ids[1:2], numbers[1:2]))
        np.testing.assert_array_equal(again, made[1])
        same_image = jnp.stack([images[0]] * 3)
        assert len({one.tobytes() for one in np.asarray(views.make(same_image, ids, numbers))}) == 3
        assert (np.asarray(other.make(images, ids, numbers % 5)) != made).any()
        assert (views.name, other.name) == ("handwriting(seed=3)", "handwriting(seed=4)")
        for count in (0, 2**31):
            with pytest.raises(UserError, match="the count of handwriting is"):
                augment.handwriting(count, 0)
