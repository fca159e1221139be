"""The speech study's figures draw what the rows and the study's files hold, and enter a report."""

import re

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgba
from matplotlib.figure import Figure

from experiments.common import report
from experiments.common.plots import OTHER, OURS, PAPER
from experiments.speech import figures

NAMES = ["temperature", "ensemble_size", "overfitting", "compression", "utterance", "confusions"]


def make_row(table, row, metric, value, std=None, **keys):
    numbers = {"value": value, "std": std, "paper": None, "seconds": 1.0, "seeds": 2}
    words = {"preset": "smoke", "source": "embedded", "selection": "last"}
    return {"table": table, "row": row, "metric": metric, **numbers, **words, **keys}


def accuracy_rows():
    found = [("baseline", 60.0, 0.2), ("10xEnsemble", 62.5, None), ("distilled, T=2", 62.1, 0.1)]
    other = [make_row("speech", name, "word_error_rate", 20.0) for name, _, _ in found]
    return [make_row("speech", n, "frame_accuracy", v, std) for n, v, std in found] + other


def temperature_rows():
    table = "speech_temperature"
    return [
        make_row(table, f"T={t:g}", metric, value - t / 10, temperature=t)
        for t in (10.0, 1.0, 2.0)
        for metric, value in (("frame_accuracy", 62.0), ("validation_frame_accuracy", 61.0))
    ] + [make_row(table, "picked by validation", "temperature", 2.0, selection="validation")]


def size_rows():
    table, metric = "speech_mean", "frame_accuracy"
    sized = [(1, 60.0, 0.2), (2, 61.5, 0.1), (10, 62.5, None)]
    rows = [make_row(table, f"ensemble of {n}", metric, v, std, size=n) for n, v, std in sized]
    return [*rows, make_row(table, "ensemble of 10, geometric mean", metric, 62.4)]


def fraction_rows():
    table = "speech_fraction"
    return [
        make_row(table, "hard targets, all data", "train_frame_accuracy", 70.0),
        make_row(table, "hard targets, all data", "frame_accuracy", 60.0, 0.2),
        make_row(table, "hard targets, 3 %, last epoch", "frame_accuracy", 40.0),
    ]


def compression_rows():
    found = [
        ("dense", 1260, 56.2, 0.3, None, None),
        ("k=64", 268, 56.0, 0.1, 0.08, 0.04),
        ("draws=130", 268, 56.1, 0.2, 0.25, 0.0),
        ("k=8", 44, 55.0, 0.2, 0.4, 0.3),
        ("draws=18", 44, 55.6, 0.4, 0.6, 0.0),
    ]
    rows = []
    for name, size, value, std, variation, bias in found:
        metrics = [
            ("bytes_per_frame", size, None),
            ("frame_accuracy", value, std),
            ("total_variation", variation, None),
            ("gradient_bias", bias, None),
        ]
        rows += [make_row("speech_compression", name, *metric, bytes=size) for metric in metrics]
    return rows


def make_curves(epochs=(1, 2)):
    train = [[50.0, 52.0, 54.0], [80.0, 82.0, 81.0]][: len(epochs)]
    hard = [[40.0, 42.0, 44.0], [30.0, 34.0, 35.0]][: len(epochs)]
    soft = [[50.0, 50.0, 50.0], [56.0, 57.0, 58.0]][: len(epochs)]
    return {
        "soft": {"epoch": list(epochs), "train": train, "test": soft},
        "hard": {"epoch": list(epochs), "train": train, "test": hard},
    }


def make_example():
    """Silence, "to", "a(2)" and "day": 204 frames; the ensemble half hears EH in frame 12."""
    phones = ["SIL"] * 10 + ["T"] * 4 + ["AH"] * 6 + ["AH"] * 2 + ["D"] * 150 + ["EY"] * 32
    names = ["AH", "D", "EH", "EY", "SIL", "T", "ZH"]
    n = len(phones)
    probability = np.full((n, len(names)), 0.02)
    probability[np.arange(n), [names.index(phone) for phone in phones]] = 0.88
    heard = probability.copy()
    heard[12, [names.index("T"), names.index("EH")]] = 0.5, 0.4
    states = np.repeat([7, 1, 2, 3, 4, 5, 6], [10, 4, 6, 2, 75, 75, 32])
    wrong = states.copy()
    wrong[:51] = 99
    return {
        "id": "utterance",
        "words": ["to", "a", "day"],
        "segments": ["<sil>", "to", "a(2)", "day"],
        "starts": [0, 10, 20, 22],
        "phones": phones,
        "states": states.tolist(),
        "log_mels": np.random.default_rng(0).standard_normal((n, 40)).tolist(),
        "posteriors": {
            "ensemble": {"phones": names, "probability": heard.tolist()},
            "distilled": {"phones": names, "probability": probability.tolist()},
        },
        "top_states": {"ensemble": states.tolist(), "distilled": wrong.tolist()},
    }


def make_confusions(count=2):
    pairs = [
        {"said": f"P{i}", "found": f"Q{i}", "ensemble": 5.0 + i, "distilled": 20.0 - i}
        for i in range(count)
    ]
    return pairs[::2] + pairs[1::2]


def every_row():
    tables = accuracy_rows(), temperature_rows(), size_rows(), fraction_rows(), compression_rows()
    return [row for table in tables for row in table]


def everything():
    return figures.all_figures(every_row(), make_curves(), make_example(), make_confusions())


def labelled(axes):
    """Lines with error bars by their label, as (x, y) pairs."""
    return {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}


def level_lines(axes):
    """Horizontal lines through the whole panel: their height by colour."""
    across = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    return {to_hex(line.get_color()): line.get_ydata()[0] for line in across}


def texts(artists):
    return [text.get_text() for text in artists]


# What is drawn, and what is left out.


def test_all_figures_have_names_captions_and_figures():
    drawn = everything()
    assert [name for name, _, _ in drawn] == NAMES
    assert all(caption.endswith(".") and isinstance(one, Figure) for _, caption, one in drawn)
    assert len({caption for _, caption, _ in drawn}) == len(NAMES)


@pytest.mark.parametrize(
    ("rows", "more", "names"),
    [
        ([], {}, []),
        (accuracy_rows() + fraction_rows(), {}, []),
        (temperature_rows(), {}, ["temperature"]),
        (size_rows(), {}, ["ensemble_size"]),
        (compression_rows(), {}, ["compression"]),
        ([], {"curves": make_curves()}, ["overfitting"]),
        ([], {"example": make_example()}, ["utterance"]),
        ([], {"confusions": make_confusions()}, ["confusions"]),
        ([row | {"value": None} for row in every_row()], {"curves": {}, "confusions": []}, []),
    ],
)
def test_figures_without_data_are_left_out(rows, more, names):
    assert [name for name, _, _ in figures.all_figures(rows, **more)] == names


# Lines.


def test_temperature_lies_between_the_baseline_and_the_ensemble():
    (axes,) = figures.temperature(temperature_rows() + accuracy_rows()).axes
    assert axes.get_xscale() == "log"
    assert texts(axes.get_xticklabels()) == ["1", "2", "10"]
    assert labelled(axes) == {
        "distilled, validation": [[1, 60.9], [2, 60.8], [10, 60.0]],
        "distilled, test": [[1, 61.9], [2, 61.8], [10, 61.0]],
    }
    assert level_lines(axes) == {PAPER: 60.0, OTHER: 62.5}
    assert texts(axes.texts) == ["baseline: 60.0", "10xEnsemble: 62.5"]
    (band,) = axes.patches
    assert (band.get_y(), band.get_height()) == pytest.approx((59.8, 0.4))
    assert axes.get_title(loc="left") == "validation picks T = 2"
    (alone,) = figures.temperature(temperature_rows()).axes
    assert level_lines(alone) == {} and texts(alone.texts) == []


def test_ensemble_size_has_the_geometric_mean_at_the_right():
    (axes,) = figures.ensemble_size(size_rows() + accuracy_rows()).axes
    lines = labelled(axes)
    assert lines["arithmetic mean"] == [[1, 60.0], [2, 61.5], [10, 62.5]]
    ((x, y),) = lines["ensemble of 10, geometric mean"]
    assert x > 10 and y == 62.4 and x < axes.get_xlim()[1]
    assert texts(axes.get_xticklabels()) == ["1", "2", "10"]
    assert level_lines(axes) == {OURS: 62.1}


def test_a_view_of_accuracies_spans_at_least_a_point():
    rows = [{**row, "value": 62 + row["size"] / 100} for row in size_rows() if "size" in row]
    (axes,) = figures.ensemble_size(rows).axes
    low, high = axes.get_ylim()
    assert high - low == pytest.approx(1.0) and low < 62.01 < 62.1 < high


def test_overfitting_shows_means_in_bands_of_the_seeds_beside_all_data():
    hard, soft = figures.overfitting(make_curves(), fraction_rows()).axes
    titles = [axes.get_title(loc="left") for axes in (hard, soft)]
    assert titles == ["hard targets, test ends at 33.0", "soft targets, test ends at 57.0"]
    train, test, complete = hard.lines
    assert train.get_xydata().tolist() == [[1, 52.0], [2, 81.0]]
    assert test.get_xydata().tolist() == [[1, 42.0], [2, 33.0]]
    assert soft.lines[1].get_ydata().tolist() == [50.0, 57.0]
    assert list(complete.get_ydata()) == [60.0, 60.0]
    assert to_hex(complete.get_color()) == PAPER
    bands = [band.get_paths()[0].get_extents() for band in hard.collections]
    assert [(band.y0, band.y1) for band in bands] == [(50.0, 82.0), (30.0, 44.0)]
    assert hard.get_ylim() == soft.get_ylim()


def test_one_epoch_shows_as_a_point_and_absent_rows_as_no_line():
    for axes in figures.overfitting(make_curves(epochs=(1,)), []).axes:
        assert [line.get_marker() for line in axes.lines] == ["o", "o"]


def test_compression_has_the_largest_and_the_drawn_by_their_bytes():
    accuracy, variation, bias = figures.compression(compression_rows()).axes
    assert labelled(accuracy) == {
        "the k largest": [[44, 55.0], [268, 56.0]],
        "drawn": [[44, 55.6], [268, 56.1]],
        "dense": [[1260, 56.2]],
    }
    assert {text.get_text(): tuple(text.xy) for text in accuracy.texts} == {
        "8": (44, 55.0),
        "64": (268, 56.0),
        "18": (44, 55.6),
        "130": (268, 56.1),
    }
    band = accuracy.patches[0]
    assert (band.get_y(), band.get_height()) == pytest.approx((55.9, 0.6))
    assert labelled(variation) == {
        "the k largest": [[44, 0.4], [268, 0.08]],
        "drawn": [[44, 0.6], [268, 0.25]],
    }
    assert labelled(bias) == {
        "the k largest": [[44, 0.3], [268, 0.04]],
        "drawn": [[44, 0.0], [268, 0.0]],
    }
    assert {axes.get_xscale() for axes in (accuracy, variation, bias)} == {"log"}


# Confusions.


def test_confusions_are_pairs_of_bars_worst_first_and_at_most_15():
    (axes,) = figures.confused_phones(make_confusions(20)).axes
    ensemble, distilled = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert ensemble == [24.0 - i for i in range(15)]
    assert distilled == [1.0 + i for i in range(15)]
    labels = texts(axes.get_yticklabels())
    assert (labels[0], labels[-1]) == ("P19 taken for Q19", "P5 taken for Q5")
    assert axes.yaxis_inverted()
    assert [to_hex(bars.patches[0].get_facecolor()) for bars in axes.containers] == [OTHER, OURS]


# The utterance.


def test_utterance_shows_what_the_nets_see_below_the_words():
    example = make_example()
    energies, phones, *_ = figures.utterance(example).axes
    image = energies.images[0].get_array()
    # Low bands at the bottom.
    np.testing.assert_array_equal(image[-1], np.array(example["log_mels"])[:, 0])
    assert energies.images[0].get_extent() == pytest.approx([0.0, 2.04, 0.0, 40.0])
    named = {text.get_text(): text.xy[0] for text in energies.texts}
    assert named == pytest.approx({"to": 0.15, "a": 0.21, "day": 1.13})
    # Where there is room: not in the two frames of the second AH.
    assert texts(phones.texts) == ["SIL", "T", "AH", "D", "EY"]
    changes = [segment[0][0] for segment in phones.collections[0].get_segments()]
    assert changes == pytest.approx([0.1, 0.14, 0.2, 0.22, 0.97, 1.72])


def test_every_panel_of_the_utterance_shares_time_and_word_boundaries():
    panels = figures.utterance(make_example()).axes
    assert len(panels) == 5
    for axes in panels:
        assert axes.get_xlim() == pytest.approx((0.0, 2.04))
        upright = [line.get_xdata()[0] for line in axes.lines if line.get_alpha() == 0.3]
        assert upright == pytest.approx([0.1, 0.2, 0.22])


def test_words_too_close_for_their_names_stand_at_different_heights():
    example = make_example()
    example["segments"] = ["first", "overlong", "wordy", "last"]
    energies = figures.utterance(example).axes[0]
    heights = {text.get_text(): text.xyann[1] for text in energies.texts}
    # Nothing is higher than it needs to be.
    assert heights["first"] == heights["wordy"] == heights["last"] < heights["overlong"]


def test_posteriors_are_of_spoken_phones_in_order_and_of_those_taken_for_them():
    example = make_example()
    panels = figures.utterance(example).axes[2:4]
    shown = ["SIL", "T", "AH", "D", "EY", "EH"]  # ZH has no share above 0.3
    for axes, net in zip(panels, ("ensemble", "distilled"), strict=True):
        assert texts(axes.get_yticklabels()) == shown[::-1]
        posteriors = example["posteriors"][net]
        columns = [posteriors["phones"].index(phone) for phone in shown]
        image = axes.images[0]
        np.testing.assert_array_equal(
            image.get_array(), np.array(posteriors["probability"])[:, columns].T
        )
        # Nothing where the probability is 0, whatever the page's colour; all colour where it is 1.
        assert image.get_clim() == (0.0, 1.0)
        assert [image.cmap(value)[3] for value in (0.0, 1.0)] == [0.0, 1.0]
        assert axes.get_ylabel().startswith(net)
    colors = [to_hex(axes.images[0].cmap(1.0)) for axes in panels]
    assert colors == [OTHER, OURS]


def test_the_aligned_path_is_framed_and_words_part_equal_phones():
    frames = figures.utterance(make_example()).axes[2].patches
    places = [(one.get_x(), one.get_width(), one.get_y()) for one in frames]
    expected = [(0, 10, 5), (10, 4, 4), (14, 6, 3), (20, 2, 3), (22, 150, 2), (172, 32, 1)]
    found = [(round(100 * x), round(100 * width), y) for x, width, y in places]
    assert found == expected
    assert {one.get_fill() for one in frames} == {False}


def test_frames_whose_top_state_is_the_aligned_one_are_filled():
    axes = figures.utterance(make_example()).axes[4]
    image = axes.images[0].get_array()
    assert image.shape == (2, 204, 4)
    np.testing.assert_array_equal(image[0], np.tile(to_rgba(OTHER), (204, 1)))
    np.testing.assert_array_equal(image[1, :, 3], np.arange(204) >= 51)
    assert texts(axes.get_yticklabels()) == ["distilled, 75 % right", "ensemble, 100 % right"]


# The report.


def test_ink_is_black_and_other_text_has_no_colour_of_its_own():
    for _, _, figure in everything():
        for axes in figure.axes:
            written = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
            written += [*axes.get_xticklabels(), *axes.get_yticklabels()]
            assert {to_hex(text.get_color()) for text in written} == {"#000000"}
            shown = [spine for spine in axes.spines.values() if spine.get_visible()]
            assert {to_hex(spine.get_edgecolor()) for spine in shown} == {"#000000"}


def test_a_report_is_written_with_every_figure(tmp_path):
    drawn = everything()
    report.write(tmp_path, "Speech", {}, every_row(), reference_rows=[], figures=drawn, seconds=1.0)
    assert sorted(p.stem for p in (tmp_path / "figures").iterdir()) == sorted(NAMES)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall('<figure id="figure-([^"]*)"', text) == NAMES
    assert "currentColor" in text and not re.search("#000000|https?:", text)
    # Images keep one pixel for each value, so that a page stays small.
    assert len(text) < 1_000_000
