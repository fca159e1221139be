"""Section 3 of the paper: MNIST. The table of stages, and the report."""

from pathlib import Path

from distill_jax.data import images
from distill_jax.nets import Net, read_meta
from experiments.common.costs import CAPTION as COSTS
from experiments.common.image_sets import check_source
from experiments.common.published import Published
from experiments.common.run import Study
from experiments.common.study import Stage, draw_report, finished_rows, read_json
from experiments.common.training import curve
from experiments.mnist import distillation, transfer_sets, views
from experiments.mnist.data import data_conflicts
from experiments.mnist.objectives import objectives

TITLE = "Distilling the Knowledge in a Neural Network, section 3: MNIST"
CAPTIONS = {
    "mnist": "A large regularised net, a small one without regularisation, and the small one "
    "distilled from the large one at T = 20 without jitter. Errors on the test set (paper: 10,000).",
    "mnist_costs": COSTS,
    "mnist_objectives": "The same small net, data, first weights and batches; the objective alone "
    "differs. The paper's come first. Later ones are at the temperature and the weights of their "
    "authors, and were not tuned here.",
    "mnist_temperature": "With 300 or more units in each hidden layer all temperatures above 8 gave "
    "fairly similar results; with 30 units, 2.5 to 4 worked significantly better.",
    "mnist_without_3": "Distilled without any example of a 3. Most errors come from its bias, which "
    "is much too low: with the right bias, a digit that was never seen is mostly right. Beyond the "
    "paper: students that see shifted images with the teacher's logits of the same shift.",
    "mnist_only_7_8": "Distilled from the 7s and 8s alone, and with their biases lowered.",
    "mnist_fraction": "The introduction's claim: soft targets carry so much per example that the small "
    "net can be trained on much less data.",
    "mnist_unlabelled": "Section 1's claim: the transfer set can consist entirely of unlabelled data. "
    "The teacher saw the labels of one half, the students the images of the other.",
    "mnist_shifts": "Beyond the paper, whose transfer set has no jitter: students that see shifted "
    "images with the teacher's logits of the same shift, or the images as they are with the mean logits "
    "of their shifts. The control has the labels of the same views, for as many steps.",
    "mnist_distorted": "Beyond the paper: nets on labels of distorted images, ever new ones; their "
    "ensemble, as in section 1; and a student that has the ensemble's logits of some views, without "
    "labels. The nets on labels are its control.",
}


def write_report(workdir: Path) -> None:
    """Draws report.md and report.html from results.json and what the stages left beside it."""
    from experiments.mnist import figures  # late: matplotlib is not needed before

    curves = {
        path.parent.name: curve(read_meta(path.parent)["history"])
        for path in sorted(workdir.glob("stages/*/*/net.json"))
    }
    digits = workdir / "stages" / "soft_targets" / "digits.json"
    rows = finished_rows(workdir, STAGES)
    reference = Path(__file__).with_name("reference.json")
    drawn = figures.all_figures(rows, curves, read_json(digits) if digits.exists() else [])
    draw_report(workdir, rows, drawn, title=TITLE, captions=CAPTIONS, reference=reference)


_DATA = ("seeds", "selection", "data")
STAGES = (
    Stage("teacher", distillation.teacher, (), (*_DATA, "teacher"), number=1, extends=True),
    Stage("soft_targets", distillation.make_soft_targets, ("teacher",), number=2),
    Stage("baseline", distillation.baseline, (), (*_DATA, "baseline"), number=3, extends=True),
    Stage(
        "distilled",
        distillation.distilled,
        ("soft_targets",),
        ("distilled",),
        number=4,
        extends=True,
    ),
    Stage("objectives", objectives, ("soft_targets",), ("objectives",), number=5, extends=True),
    Stage("costs", distillation.costs_of_nets, ("teacher", "baseline", "distilled"), number=11),
    Stage("sweep", distillation.sweep, ("soft_targets",), ("sweep",), number=6, extends=True),
    Stage(
        "without_3",
        transfer_sets.without_3,
        ("soft_targets",),
        ("omissions",),
        number=7,
        extends=True,
    ),
    Stage(
        "only_7_8",
        transfer_sets.only_7_8,
        ("soft_targets",),
        ("omissions",),
        number=8,
        extends=True,
    ),
    Stage(
        "fractions",
        transfer_sets.fractions,
        ("soft_targets",),
        ("fractions",),
        number=9,
        extends=True,
    ),
    Stage(
        "unlabelled",
        transfer_sets.unlabelled,
        (),
        (*_DATA, "teacher", "unlabelled"),
        number=10,
        extends=True,
    ),
    Stage("shift_targets", views.shift_targets, ("teacher",), ("shifts",), number=12),
    Stage("shifts", views.shifts, ("shift_targets",), ("distilled",), number=13),
    Stage(
        "moved_omissions",
        transfer_sets.moved,
        ("shift_targets",),
        ("moved_omissions",),
        number=17,
        extends=True,
    ),
    Stage("distorted", views.distorted, (), (*_DATA, "distorted"), number=14, extends=True),
    Stage("distorted_targets", views.distorted_targets, ("distorted",), number=15),
    Stage("distorted_students", views.distorted_students, ("distorted_targets",), number=16),
)


def test_errors(net: Net) -> float:
    """A net's errors on MNIST's test set."""
    test = images.load("embedded").test
    return float((net.logits(test["inputs"]).argmax(axis=-1) != test["label"]).sum())


PUBLISHED = {
    "distilled": Published(
        "distilled/distilled", ("mnist", "distilled 2x800, T=20", "test_errors"), test_errors
    )
}

STUDY = Study(STAGES, write_report, check_source, data_conflicts, PUBLISHED)
