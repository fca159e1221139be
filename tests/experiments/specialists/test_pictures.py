"""The specialist study's pictures: clusters, their covariance, and a gallery of examples."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from specialist_pictures import C, make_clusters, make_gallery, make_pictures, texts

from experiments.common import report
from experiments.common.plots import OTHER, OURS
from experiments.specialists import pictures


def brightness(sheet, rows, columns):
    """The middle pixel of each place in a sheet as (red, alpha)."""
    height, width = sheet.shape[0] // rows, sheet.shape[1] // columns
    return sheet[height // 2 :: height, width // 2 :: width][..., [0, 3]].tolist()


def svg_size(figure):
    return len(report._svg("name", "", figure)["drawing"])


# What is drawn, and what is left out.


def test_clusters_are_rows_of_pictures_nearest_first_with_empty_places():
    (axes,) = pictures.clusters(make_clusters()).axes
    expected = [[[10 * (c + 1), 255] for c in range(m, C, 3)] for m in range(3)]
    for row in expected[1:]:
        row[-2:] = [[0, 0]] * 2
    assert brightness(axes.images[0].get_array(), 3, 8) == expected
    labels = dict(zip(axes.get_yticks(), texts(axes.get_yticklabels()), strict=True))
    assert labels == {0.5: "3", 1.5: "2", 2.5: "1"}


def test_a_contact_sheet_has_at_most_12_rows_of_20():
    found = {"central": np.tile(np.arange(C), (15, 1)), "class_images": make_pictures(C)}
    (axes,) = pictures.clusters(found).axes
    assert axes.images[0].get_extent() == [0.0, 20.0, 0.0, 12.0]
    assert len(axes.get_yticks()) == 12


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((6, 6), (6, 6)),
        ((6, 10), (6, 10)),
        ((10, 6, 3), (10, 6)),
        ((48, 48, 3), (48, 48)),
        ((96, 96), (48, 48)),
        ((97, 100, 3), (32, 33)),
    ],
)
def test_pictures_of_any_shape_become_small_squares(shape, size):
    tiles = pictures._tiles(make_pictures(2, shape))
    assert tiles.shape == (2, max(size), max(size), 4) and tiles.dtype == np.uint8
    opaque = tiles[..., 3] == 255
    assert opaque.sum(axis=(1, 2)).tolist() == [size[0] * size[1]] * 2
    for tile, inside, value in zip(tiles, opaque, (10, 20), strict=True):
        assert (tile[inside] == [value, value, value, 255]).all()
        assert (tile[~inside] == 0).all()


def test_colours_are_kept():
    images = np.broadcast_to(np.uint8([200, 100, 50]), (1, 96, 96, 3))
    assert (pictures._tiles(images) == [200, 100, 50, 255]).all()


def test_covariance_is_a_correlation_with_clusters_side_by_side_and_framed():
    axes, bar = pictures.covariance(make_clusters()).axes
    cluster = np.repeat(np.arange(3), 8)
    expected = np.where(cluster[:, None] == cluster, 0.5, -0.1) + 0.5 * np.eye(C)
    np.testing.assert_allclose(axes.images[0].get_array(), expected, atol=1e-6)
    frames = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in axes.patches]
    assert frames == [(0, 0, 8, 8), (8, 8, 8, 8), (16, 16, 8, 8)]
    assert texts(axes.get_yticklabels()) == ["1", "2", "3"]
    assert bar.get_ylabel() == "correlation of predictions"


def test_a_class_that_is_never_predicted_correlates_with_none():
    found = make_clusters()
    found["matrix"][4] = found["matrix"][:, 4] = 0.0
    place = 8 + 1  # the second of cluster 1
    image = pictures.covariance(found).axes[0].images[0].get_array()
    assert (image[place] == 0).all() and (image[:, place] == 0).all()
    assert np.isfinite(image).all()


def test_many_classes_share_dots_of_which_the_brightest_counts():
    size = 1003
    matrix = np.eye(size, dtype=np.float32)
    matrix[7, 1002] = matrix[1002, 7] = 0.4
    found = {"matrix": matrix, "assignment": np.zeros(size, np.int32)}
    image = pictures.covariance(found).axes[0].images[0].get_array()
    assert image.shape == (335, 335)
    assert image[2, 334] == image[334, 2] == pytest.approx(0.4)
    assert np.count_nonzero(image) == 335 + 2


@pytest.mark.parametrize("size", [400, 600, 2000])
def test_a_covariance_of_pure_noise_takes_less_than_400_kilobytes(size):
    random = np.random.default_rng(0)
    matrix = 0.005 * 200 ** random.random((size, size), np.float32)
    np.fill_diagonal(matrix, 1.0)
    found = {"matrix": matrix, "assignment": random.integers(0, 61, size)}
    assert svg_size(pictures.covariance(found)) < 400_000


def test_gallery_has_corrected_examples_beside_broken_ones():
    found = make_gallery((True, False, True))
    grid = pictures.gallery(found, make_pictures(C)).axes
    assert [axes.get_title(loc="left") for axes in grid] == ["corrected", "broken", "", ""]
    shown = [axes.images[0].get_array()[..., 0] for axes in grid[:3]]
    np.testing.assert_array_equal(shown, found["image"][[0, 1, 2]])
    assert not grid[3].images and not grid[3].patches


@pytest.mark.parametrize(("corrected", "true"), [(True, [1, 5]), (False, [0, 6])])
def test_an_example_has_its_class_and_the_most_probable_ones_under_their_bars(corrected, true):
    found = make_gallery((corrected,))
    (axes,) = pictures.gallery(found, make_pictures(C)).axes
    empty = C
    line = [3, empty, empty, *found["before_class"][0], empty, *found["after_class"][0]]
    expected = [[0, 0] if c == empty else [10 * (c + 1), 255] for c in line]
    assert brightness(axes.images[1].get_array(), 1, 14) == [expected]
    bars = [bar for container in axes.containers for bar in container]
    heights = [*found["before"][0], *found["after"][0]]
    assert [bar.get_height() / 2 for bar in bars] == pytest.approx(heights)
    colors = [to_hex(bar.get_facecolor()) for bar in bars]
    assert colors == [OTHER if i in true else OURS for i in range(10)]
    assert texts(axes.texts)[:5] == ["50", "25", "12", "10", "0"]


def test_bars_stand_above_the_pictures_of_their_classes():
    axes = pictures.gallery(make_gallery((True,)), make_pictures(C)).axes[0]
    example, line = axes.images
    assert example.get_extent() == [0.0, 2.0, 1.15, 3.15]
    assert line.get_extent() == [0.0, 14.0, 0.0, 1.0]
    middles = [bar.get_x() + bar.get_width() / 2 for bars in axes.containers for bar in bars]
    assert middles == pytest.approx([3.5, 4.5, 5.5, 6.5, 7.5, 9.5, 10.5, 11.5, 12.5, 13.5])


def test_gallery_shows_at_most_six_of_a_kind_and_no_empty_column():
    grid = pictures.gallery(make_gallery((True,) * 9), make_pictures(C)).axes
    assert [len(axes.images) for axes in grid] == [2] * 6
    mixed = pictures.gallery(make_gallery((True,) * 9 + (False,)), make_pictures(C)).axes
    assert len(mixed) == 12 and sum(len(axes.images) for axes in mixed) == 14


# The report.


def test_pictures_enter_a_report_pixel_by_pixel():
    figure = pictures.clusters(make_clusters())
    drawing = report._svg("name", "", figure)["drawing"]
    (encoded,) = re.findall(r"base64,([^\"]*)\"", drawing)
    image = np.array(Image.open(io.BytesIO(base64.b64decode(encoded))))
    sheet = figure.axes[0].images[0].get_array()
    assert image.shape == sheet.shape and sorted(image.ravel()) == sorted(np.ravel(sheet))
