"""The specialist study as a user runs it, on a few classes of the embedded glyphs."""

import itertools
import json
import re
import shlex
import shutil

import jax
import notebooks
import numpy as np
import pytest
import training_notes
from command import fails, kill_when, run
from result_rows import find
from specialist_pictures import FIGURES

from distill_jax import nets
from distill_jax.specialists import store
from experiments.common import published, report
from experiments.specialists import glyphs
from experiments.specialists.config import get_config
from experiments.specialists.programs import programs
from experiments.specialists.study import PUBLISHED, STAGES

SMOKE = "--config=experiments/specialists/config.py:smoke"
CONFIG = get_config("smoke")
FULL = f"generalist + {CONFIG.clusters.count} specialists"
CONTROLS = (
    f"{FULL} of random classes",
    "generalist, trained as much longer",
    "ensemble of 2 generalists at equal cost",
    f"{FULL} of greedily made sets",
    f"mixture of {CONFIG.clusters.count} experts, from the generalist",
)
TO_SPECIALISTS = "--stages=generalist,clusters,specialists"
PAPER = {
    ("generalist", "test_accuracy"): 25.0,
    ("generalist", "conditional_test_accuracy"): 43.1,
    (FULL, "test_accuracy"): 26.1,
    (FULL, "conditional_test_accuracy"): 45.9,
    (FULL, "relative_change_percent"): 4.4,
}
PAPER_TABLE_4 = {
    "examples": (350037, 141993, 67161, 38801, 26298, 16474, 10682, 7376, 4703, 4706, 9082),
    "change_in_top1_correct": (0, 1421, 1572, 1124, 835, 561, 362, 232, 182, 208, 324),
    "relative_change_percent": (0.0, 3.4, 7.4, 8.8, 10.5, 11.1, 11.3, 12.8, 13.6, 16.6, 14.1),
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("specialists") / "run"
    run(SMOKE, f"--workdir={path}")
    return path


def test_the_listed_programs_are_those_that_are_run(workdir):
    training_notes.check(workdir, programs, CONFIG)


def test_curves_are_of_all_seeds_that_were_trained_in_turn(workdir):
    whole = published.history(workdir)["generalist"]
    assert whole["epoch"] == [2, 4, 6]
    folders = sorted((workdir / "stages/generalist/generalist").glob("seeds_*"))
    each = [nets.read_meta(folder)["history"] for folder in folders]
    assert whole["test_errors"] == [
        [x for record in records for x in record["test_errors"]]
        for records in zip(*each, strict=True)
    ]


@pytest.fixture(scope="module")
def rows(workdir):
    return report.load_rows(workdir / "results.json")


@pytest.fixture(scope="module")
def one_by_one(workdir, tmp_path_factory):
    """The generalists' specialists again, each trained alone."""
    path = tmp_path_factory.mktemp("one_by_one") / "run"
    run(*alone(workdir), f"--workdir={path}")
    return path


def alone(workdir):
    return SMOKE, TO_SPECIALISTS, f"--reuse={workdir}", "--config.specialists.at_once=1"


def of_seeds(row):
    """The values of two seeds, in any order."""
    assert row["seeds"] == 2
    half = row["std"] / np.sqrt(2)
    return np.array([row["value"] - half, row["value"] + half])


def means(function, *rows):
    """The mean over two seeds of a function of their values, for all ways to pair these."""
    first, *others = map(of_seeds, rows)
    turned = itertools.product(*[(values, values[::-1]) for values in others])
    return [function(first, *values).mean() for values in turned]


def assert_one_of(value, possible):
    assert np.isclose(value, possible, rtol=1e-6).any(), (value, possible)


def test_every_table_has_its_rows(rows):
    found = {}
    for row in rows:
        found.setdefault(row["table"], set()).add(row["row"])
    dustbins = {"dustbin", "dustbin of many outputs"}
    full = {f"full softmax, {t}" for t in ("hard targets", "the generalist's soft targets")}
    covers = found.pop("specialists_coverage")
    assert covers <= {f"covered by {n}" for n in range(CONFIG.clusters.count + 1)}
    assert "covered by 1" in covers
    assert found == {
        "specialists": {"generalist", FULL, f"{FULL}, n = 1", *CONTROLS},
        "specialists_clusters": {
            "by covariance",
            "by covariance, greedily",
            "by confusions",
            "at random",
        },
        "specialists_comparison": {
            *(f"{FULL}, against {name}" for name in ("generalist", *CONTROLS)),
            f"{FULL}, n = 1, against generalist",
            f"{FULL} of greedily made sets, against generalist",
            "generalist, trained as much longer, against generalist",
            "distilled, from the generalist",
            "distilled, from the generalist, against generalist",
            "distilled, from the generalist, against trained as long on labels",
            "gain with each further specialist of a covered class (slope of Table 4)",
        },
        "specialists_soft": {"generalist"}
        | {f"{name}{end}" for name in dustbins | full for end in ("", ", early stopping")}
        | {"soft less hard targets"}
        | {f"{how} targets, the last epoch less early stopping" for how in ("hard", "soft")},
        "specialists_distilled": {
            "generalist",
            FULL,
            "distilled, from the generalist",
            "distilled, from scratch",
            "trained as long on labels",
        },
        "specialists_costs": {FULL, "generalist", "distilled, from the generalist"},
        "specialists_inference": {"newton", "fixed point", "adam", "gradient descent"},
    }
    # A dustbin does not tell the other classes apart.
    of_others = {row["row"] for row in rows if row["metric"] == "other_accuracy"}
    assert of_others >= full and not of_others & dustbins
    stopped = [row for row in rows if row["row"].endswith(", early stopping")]
    assert {row["selection"] for row in stopped} == {"validation"}


def test_all_values_are_sane(rows):
    assert all(np.isfinite(row["value"]) for row in rows)
    chance = 100 / CONFIG.data.classes
    for row in rows:
        if row["metric"].endswith("accuracy"):
            assert chance < row["value"] < 100, row
        if row["metric"] == "training_seconds":
            assert row["value"] > 0
    for name in ("by covariance", "by confusions", "at random"):
        covered, often, mistakes = (
            find(rows, "specialists_clusters", name, metric)["value"]
            for metric in (
                "classes_covered_percent",
                "sets_per_covered_class",
                "mistakes_covered_percent",
            )
        )
        assert 0 < covered <= 100 and 0 < mistakes <= 100
        assert 1 <= often <= CONFIG.clusters.count
    for name in ("newton", "fixed point"):
        numbers = {row["metric"]: row["value"] for row in rows if row["row"] == name}
        assert numbers["top1_agreement"] == 1 and numbers["unfinished"] == 0
        assert numbers["passes_median"] <= numbers["passes_p99"] <= CONFIG.inference.max_passes
        adam = find(rows, "specialists_inference", "adam", "passes_median")["value"]
        assert numbers["passes_median_against_adam"] == adam / numbers["passes_median"]


@pytest.mark.parametrize("name", [FULL, *CONTROLS])
def test_changes_agree_with_the_accuracies(rows, name):
    for split, prefix in (("test", ""), ("seen", "seen_")):
        before, after = (
            find(rows, "specialists", system, f"{split}_accuracy")
            for system in ("generalist", name)
        )
        change = find(rows, "specialists", name, f"{prefix}relative_change_percent")["value"]
        assert_one_of(change, means(lambda old, new: 100 * (new - old) / old, before, after))
    before, after = (
        find(rows, "specialists", system, "test_accuracy") for system in ("generalist", name)
    )
    removed = find(rows, "specialists", name, "errors_removed_percent")["value"]
    assert_one_of(removed, means(lambda old, new: 100 * (new - old) / (100 - old), before, after))


@pytest.mark.parametrize("name", CONTROLS)
def test_comparisons_are_differences_of_changes(rows, name):
    whole, other = (
        find(rows, "specialists", one, "relative_change_percent")["value"] for one in (FULL, name)
    )
    for end in ("", "_over_examples", "_over_typefaces"):
        found = find(
            rows, "specialists_comparison", f"{FULL}, against {name}", f"difference_percent{end}"
        )
        assert found["value"] == pytest.approx(whole - other)
        low, high = found["interval"]
        assert low < found["value"] < high


def test_coverage_adds_up_to_the_whole(rows):
    labels = glyphs.load("embedded").splits["test"]["label"]
    size = np.count_nonzero(labels < CONFIG.data.classes)
    total = {
        metric: sum(
            row["value"]
            for row in rows
            if (row["table"], row["metric"]) == ("specialists_coverage", metric)
        )
        for metric in ("examples", "change_in_top1_correct")
    }
    before, after = (
        find(rows, "specialists", name, "test_accuracy")["value"] for name in ("generalist", FULL)
    )
    assert total["examples"] == pytest.approx(size)
    assert total["change_in_top1_correct"] == pytest.approx(size * (after - before) / 100)


def test_distilled_keeps_a_share_of_the_gain(rows):
    table = "specialists_distilled"
    before, after = (find(rows, table, name, "test_accuracy") for name in ("generalist", FULL))
    for name, row in (("generalist", before), (FULL, after)):
        assert row["value"] == pytest.approx(
            find(rows, "specialists", name, "test_accuracy")["value"]
        )
    assert find(rows, table, FULL, "gain_kept_percent")["value"] == pytest.approx(100)
    student = find(rows, table, "distilled, from the generalist", "test_accuracy")
    kept = find(rows, table, "distilled, from the generalist", "gain_kept_percent")["value"]
    shares = means(lambda old, top, new: 100 * (new - old) / (top - old), before, after, student)
    assert_one_of(kept, shares)


def test_the_papers_values_are_on_their_rows(rows):
    of_paper = {
        table: [row for row in rows if row["table"] == table and row["paper"] is not None]
        for table in {row["table"] for row in rows}
    }
    table_3 = of_paper.pop("specialists")
    assert {(row["row"], row["metric"]): row["paper"] for row in table_3} == PAPER
    for row in of_paper.pop("specialists_coverage"):
        assert row["row"] == f"covered by {row['cover']}"
        assert row["paper"] == PAPER_TABLE_4[row["metric"]][row["cover"]]
    assert not any(of_paper.values())


def test_the_report_has_the_figures(workdir):
    page = (workdir / "report.html").read_text()
    for name in FIGURES:
        assert (workdir / "figures" / f"{name}.png").stat().st_size > 1000
        assert f"{name}-" in page  # of the ids within its drawing
    for number in ("43.1", "45.9", "141993"):
        assert f">{number}<" in page


def test_what_is_published_is_among_nets_and_rows(workdir, rows):
    for one in PUBLISHED.values():
        assert nets.read_meta(workdir / "stages" / one.training)["members"] == len(CONFIG.seeds)
        assert len(find(rows, *one.row)["values"]) == len(CONFIG.seeds)


def test_a_second_run_does_nothing(workdir):
    before = (workdir / "results.json").read_text()
    output = run(SMOKE, f"--workdir={workdir}")
    assert "running" not in output and output.count("finished before") == len(STAGES)
    assert (workdir / "results.json").read_text() == before


def specialists_of(directory, seed):
    return directory / "stages/specialists/specialists" / f"seed_{seed}" / "specialists"


def test_the_notebook_runs_from_top_to_bottom(workdir, rows, tmp_path):
    _, printed, pictures = notebooks.run("specialists", workdir, tmp_path)
    accuracies = [find(rows, "specialists", name, "test_accuracy") for name in ("generalist", FULL)]
    before, after = (row["values"][0] for row in accuracies)
    assert printed["restore"] == f"accuracy {before:.2f} to {after:.2f} % of test\n"
    counts = re.findall(r"^(\d+) (corrected|spoiled)", printed["corrected"], re.MULTILINE)
    assert [name for _, name in counts] == ["corrected", "spoiled"]
    examples = sum(row["value"] for row in rows if row["metric"] == "examples")
    gained = int(counts[0][0]) - int(counts[1][0])
    assert gained == round((after - before) / 100 * examples)
    assert len(pictures["corrected"]) == 2


def test_specialists_are_the_same_in_groups_and_alone(workdir, one_by_one, rows):
    for seed in CONFIG.seeds:
        grouped, single = (store.load(specialists_of(d, seed)) for d in (workdir, one_by_one))
        np.testing.assert_array_equal(grouped.class_sets, single.class_sets)
        np.testing.assert_array_equal(grouped.corrections, single.corrections)
        assert grouped.head == single.head and grouped[4:] == single[4:]
        # Sums are in another order, and all steps of training add to that: less than one step.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a, b, atol=CONFIG.specialists.learning_rate / 3
            ),
            grouped.net.params,
            single.net.params,
        )
    again = report.load_rows(one_by_one / "results.json")
    for metric in ("test_accuracy", "conditional_test_accuracy", "seen_accuracy"):
        values = [find(part, "specialists", FULL, metric)["value"] for part in (rows, again)]
        assert abs(values[0] - values[1]) < 0.2


def test_a_killed_run_ends_with_the_same_numbers(workdir, one_by_one, tmp_path):
    """Killed behind a finished group, and again behind a seed's finished specialists."""
    killed = tmp_path / "killed"
    for seed, group in ((0, "group_001"), (1, "group_000")):
        sign = f"stages/specialists/specialists/seed_{seed}/{group}"
        kill_when(killed, sign, alone(workdir))
        assert specialists_of(killed, 0).exists() == (seed == 1)
        assert not specialists_of(killed, 1).exists()
    output = run(*alone(workdir), f"--workdir={killed}")
    assert "seed 1" in output and f"of {CONFIG.clusters.count}, seed 0" not in output
    assert measured(killed) == measured(one_by_one)


def test_specialists_trained_as_jobs_side_by_side(workdir, one_by_one, tmp_path):
    """Two jobs train the groups of both seeds; the study as usual ends with the same numbers."""
    parts = tmp_path / "parts"
    for name in ("generalist", "clusters"):
        shutil.copytree(workdir / "stages" / name, parts / "stages" / name)
    config = json.loads((workdir / "config.json").read_text())
    config["specialists"]["at_once"] = 1
    (parts / "config.json").write_text(json.dumps(config))
    flags = (SMOKE, f"--workdir={parts}", "--config.specialists.at_once=1")
    output = run(*flags, "--parts=specialists:2", "--at_once=2", module="launch.sweep")
    for first in (0, 1):
        log = (parts / f"specialists-{first}-of-2/log.txt").read_text()
        groups = range(first + 1, 9, 2)
        assert [f"specialists: group {number} of 8" in log for number in groups] == [True] * 4
    assert not (parts / "stages/specialists/stage.json").exists()
    finish = shlex.split(output.splitlines()[-1].partition(": ")[2])
    output = run(*finish[3:], TO_SPECIALISTS)
    assert not re.search(r"specialist: \d", output)  # nothing is left to train
    assert measured(parts) == measured(one_by_one)


def measured(directory):
    """The rows without times."""
    rows = json.loads((directory / "results.json").read_text())
    return [{**row, "seconds": None} for row in rows if row["metric"] != "training_seconds"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["clusters.size=60"], "--config.clusters.size is 60; allowed: up to 59"),
        (["data.classes=1001"], "data.classes is 1001, but there are 1000 classes"),
        (["data.source={folder}"], "data.source: no prepared glyphs set in {folder}; prepare .*"),
        (
            ["data.source=tfds:cifar100", "data.data_dir={folder}"],
            "tfds:cifar100 is not prepared.* tfds build cifar100 --data_dir={folder} .*",
        ),
    ],
)
def test_mistakes_end_with_one_clear_line(workdir, tmp_path, arguments, expected):
    folder = tmp_path / "empty"
    folder.mkdir()
    flags = [f"--config.{argument}".replace("{folder}", str(folder)) for argument in arguments]
    message = fails(
        SMOKE, TO_SPECIALISTS, f"--reuse={workdir}", f"--workdir={tmp_path}/run", *flags
    )
    assert re.match(f"error: {expected}".replace("{folder}", str(folder)), message), message


def test_a_stage_before_those_it_needs(tmp_path):
    message = fails(SMOKE, f"--workdir={tmp_path}", "--stages=specialists")
    assert "stage specialists needs generalist, clusters, not finished" in message
    assert message.endswith(TO_SPECIALISTS)


def test_specialists_of_another_generalist_are_refused(workdir, tmp_path):
    for name in ("generalist", "clusters", "specialists"):
        shutil.copytree(workdir / "stages" / name, tmp_path / "stages" / name)
    shutil.copy(workdir / "config.json", tmp_path)
    first, second = (specialists_of(tmp_path, seed) for seed in CONFIG.seeds)
    wanted, other = (store.load(path).generalist for path in (first, second))
    shutil.rmtree(first)
    shutil.copytree(second, first)
    message = fails(SMOKE, f"--workdir={tmp_path}", "--stages=soft_targets")
    assert message == (
        f"error: the specialists in {first} are of another training: generalist is "
        f"'{other}' there and '{wanted}' now"
    )
