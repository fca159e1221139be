"""Sections 5, 6.1 and 8 of the paper: a generalist and specialists. The stages, and their rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill_jax.nets import Net
from experiments.common.costs import CAPTION as COSTS
from experiments.common.published import PRESET, Published
from experiments.common.run import Study
from experiments.common.study import Row, Stage, draw_report, finished_rows, read_json
from experiments.specialists import (
    clusters,
    comparison,
    controls,
    distilled,
    eq5_solvers,
    full_softmax,
    mixture,
    table3,
)
from experiments.specialists.config import get_config
from experiments.specialists.data import check_source, data_conflicts, load_test

TITLE = "Distilling the Knowledge in a Neural Network, sections 5, 6.1 and 8: specialists"
CAPTIONS = {
    "specialists": "Table 3. A generalist of all classes, and with specialists of classes that it "
    "confuses, by Eq. 5. The paper's set has 15,000 classes and 100 million images: read differences "
    "here, not levels. Conditional accuracy is that on examples of special classes with predictions "
    "restricted to them, over all sets. n is the number of the generalist's most probable classes that "
    "make specialists active. Test has typefaces that no net has seen; seen, other characters of those "
    "that the nets learned from. Controls are meant to cost what the specialists did: compare training "
    "seconds, which are per seed and include the features that specialists are fed. Experts of a "
    "mixture learn together: in each step every expert sends the probability of each example's label, "
    "and is sent its share (section 7); specialists exchange nothing.",
    "specialists_coverage": "Table 4. Accuracy improvements are larger when more specialists cover a "
    "class. By the number of specialists that cover the correct class.",
    "specialists_clusters": "Table 2 and section 5.3. Clusters by the covariance of predictions, which "
    "needs no labels, by confusions, and at random: how many classes are in some set, and which share "
    "of the generalist's mistakes on validation typefaces is between two classes of one set.",
    "specialists_comparison": "What specialists add beyond other uses of the same time: differences of "
    "test accuracy relative to the generalist's, paired, as a seed's systems begin with one generalist. "
    "The same values with three intervals: over seeds (Student), over test examples and over test "
    "typefaces (bootstrap). Typefaces are few and unlike each other, so theirs is the widest.",
    "specialists_soft": "Section 6.1. Specialists tend to overfit on their special classes. With a full "
    "softmax and the generalist's soft targets for all other classes they keep what it knows. Accuracy "
    "on examples of special classes restricted to these, and of the others restricted to those; test "
    "accuracy is that of the generalist with these few specialists.",
    "specialists_distilled": "Section 8 leaves open whether the specialists' knowledge can be distilled "
    "back into the single net. Here it is: soft targets are the q of Eq. 5. The net that starts from "
    "the generalist and the control on labels are trained for as long, on the same examples.",
    "specialists_costs": f"{COSTS} All specialists are run on each example.",
    "specialists_inference": "Section 5.4. Ways to solve Eq. 5 on this study's predictions, for "
    "examples with an active specialist: passes until the probability of every class is within 1e-6 of "
    "the solution.",
}


def write_report(workdir: Path) -> None:
    """Draws report.md and report.html from results.json and what the stages left beside it."""
    from experiments.specialists import figures  # late: matplotlib is not needed before

    rows = _side_by_side(finished_rows(workdir, STAGES))
    stages = workdir / "stages"
    left = {}
    pictures = sorted((stages / "clusters").glob("seed_*.npz"))
    if pictures:
        left["clusters"] = dict(np.load(pictures[0]))
    if (stages / "specialists" / "gallery.npz").exists():
        left["gallery"] = dict(np.load(stages / "specialists" / "gallery.npz"))
    if (stages / "soft" / "curves.json").exists():
        left["curves"] = read_json(stages / "soft" / "curves.json")
    drawn = figures.all_figures(rows, **left)
    reference = Path(__file__).with_name("reference.json")
    captions = dict(CAPTIONS)
    if pictures:
        named = read_json(pictures[0].with_suffix(".json"))
        sets = "; ".join(f"{i}: {', '.join(names)}" for i, names in enumerate(named, 1))
        captions["specialists_clusters"] += (
            f" The classes nearest to each centroid of K-means are {sets}."
        )
    draw_report(workdir, rows, drawn, title=TITLE, captions=captions, reference=reference)


def _side_by_side(rows: Sequence[Row]) -> list[Row]:
    """A system's rows together, though a later stage measured some of them."""
    places: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows):
        places.setdefault((row["table"], row["row"]), i)
    tables = list(dict.fromkeys(row["table"] for row in rows))
    return sorted(rows, key=lambda r: (tables.index(r["table"]), places[r["table"], r["row"]]))


_DATA = ("seeds", "selection", "data")
_SPECIALISTS = ("generalist", "clusters", "specialists")
_COMPARED = ("specialists", "random", "longer", "ensemble", "other_sets", "mixture")
STAGES = (
    Stage("generalist", table3.generalist, (), (*_DATA, "generalist"), number=1, extends=True),
    Stage("clusters", clusters.cluster, ("generalist",), ("clusters", "specialists"), number=2),
    Stage(
        "specialists",
        table3.specialists,
        ("generalist", "clusters"),
        ("specialists",),
        table3.specialist_groups,
        number=3,
    ),
    Stage(
        "random",
        table3.random_specialists,
        ("generalist",),
        ("clusters", "specialists"),
        table3.random_groups,
        number=4,
    ),
    Stage("longer", controls.longer, ("generalist",), ("controls",), number=5, extends=True),
    Stage(
        "ensemble",
        controls.ensemble,
        ("generalist",),
        ("controls", "specialists"),
        number=6,
        extends=True,
    ),
    Stage(
        "other_sets",
        table3.other_sets,
        ("generalist", "clusters"),
        ("specialists",),
        table3.other_groups,
        number=12,
    ),
    Stage(
        "mixture",
        mixture.mixtures,
        ("generalist",),
        ("clusters", "specialists", "mixture"),
        number=13,
    ),
    Stage("soft", full_softmax.soft, ("generalist", "clusters"), ("specialists", "soft"), number=7),
    Stage("soft_targets", distilled.make_soft_targets, _SPECIALISTS, ("distilled",), number=8),
    Stage(
        "distilled",
        distilled.distilled,
        (*_SPECIALISTS, "soft_targets", "longer"),
        ("distilled",),
        number=9,
    ),
    Stage("comparison", comparison.compare, (*_COMPARED, "clusters", "distilled"), number=14),
    Stage(
        "costs",
        distilled.costs_of_nets,
        (*_SPECIALISTS, "distilled"),
        number=11,
    ),
    Stage("inference", eq5_solvers.compare_solvers, _SPECIALISTS, ("inference",), number=10),
)


def test_accuracy(net: Net) -> float:
    """A net's accuracy on the published run's test examples, per cent."""
    test = load_test(get_config(PRESET))
    return 100.0 * float((net.logits(test["inputs"]).argmax(axis=-1) == test["label"]).mean())


PUBLISHED = {
    "generalist": Published(
        "generalist/generalist",
        ("specialists", "generalist", "test_accuracy"),
        test_accuracy,
        within=0.02,  # convolutions round differently on another machine
    ),
    "distilled": Published(
        "distilled/from_generalist",
        ("specialists_distilled", comparison.DISTILLED, "test_accuracy"),
        test_accuracy,
        within=0.02,
    ),
}

STUDY = Study(STAGES, write_report, check_source, data_conflicts, PUBLISHED)
