"""Sections 4 and 6 of the paper on recorded speech. The stages, and the rows that they measure."""

from collections.abc import Sequence
from pathlib import Path

from experiments.common.costs import CAPTION as COSTS
from experiments.common.run import Study
from experiments.common.study import Row, Stage, draw_report, finished_rows, read_json
from experiments.speech import comparisons, nets, recognition, table1, table5
from experiments.speech.data import check_source
from experiments.speech.embedded_test import PUBLISHED

TITLE = "Distilling the Knowledge in a Neural Network, sections 4 and 6: speech"
CAPTIONS = {
    "speech": "Table 1. One net; the average of ten that differ in their seeds alone; and one net of "
    "the same size distilled from the ten. More than 80 % of the ensemble's gain in frame accuracy is "
    "transferred (86 % by the table). The paper's nets had 2000 hours of speech; read differences here, "
    "not levels. The standard error of the share is over members and students.",
    "speech_differences": "How far the nets are apart on the same test utterances: percentages of "
    "frames, or of words; positive where the first has more. Utterances are drawn anew for the "
    "intervals: one without 0 is a difference beyond the chance of which utterances were spoken.",
    "speech_costs": COSTS,
    "speech_temperature": "The paper tried temperatures 1, 2, 5 and 10 and used 2.",
    "speech_mean": "Section 1: the members' predictions are averaged by an arithmetic or a geometric "
    "mean. And what ever more members give.",
    "speech_compression": "What it costs to keep a few numbers of a frame's soft targets: the k "
    "largest, or classes drawn with their probabilities, of as many bytes. The gradient's errors are "
    "with respect to the logits, relative to the root mean square norm of the frames' dense gradients: "
    "the bias is the mean over frames and draws, the noise of one frame's differs from draw to draw. "
    "Total variation is half the sum of the differences of probabilities. The KL divergence is infinite "
    "where a class was not drawn, and left out. A seed's students begin alike.",
    "speech_fraction": "Table 5. With 3 % of the data, hard targets overfit badly even with early "
    "stopping; soft targets recover nearly all of what the full data hold, and need no early stopping. "
    "Training accuracies are of the finished nets; at early stopping, of the net while it trained.",
    "speech_unlabelled": "Section 4.1: Li et al. matched class probabilities at a temperature of 1 on "
    "unlabelled data and closed 28 % of the gap between a small and a large model.",
}


def write_report(workdir: Path) -> None:
    """Draws report.md and report.html from results.json and what the stages left beside it."""
    from experiments.speech import figures  # late: matplotlib is not needed before

    rows = _side_by_side(finished_rows(workdir, STAGES))
    reference = Path(__file__).with_name("reference.json")
    left = {
        name: read_json(workdir / "stages" / path)
        for name, path in (
            ("curves", "fractions/curves.json"),
            ("example", "recognition/example.json"),
            ("confusions", "recognition/confusions.json"),
        )
        if (workdir / "stages" / path).exists()
    }
    draw_report(
        workdir,
        rows,
        figures.all_figures(rows, **left),
        title=TITLE,
        captions=CAPTIONS,
        reference=reference,
    )


def _side_by_side(rows: Sequence[Row]) -> list[Row]:
    """A net's rows together, though its words were counted by a later stage."""
    places = {key: i for i, key in reversed(list(enumerate(map(_net, rows))))}
    return sorted(rows, key=lambda row: places[_net(row)])


def _net(row: Row) -> tuple[str, str]:
    return row["table"], row["row"]


_SHARED = ("selection", "data", "ensemble")
_DISTILLED = ("ensemble", "soft_targets", "distilled")
_TARGETS = ("soft_targets", "compression")
STAGES = (
    Stage("ensemble", table1.ensemble, (), _SHARED, nets.ensemble_groups, number=1, extends=True),
    Stage(
        "soft_targets",
        table1.make_soft_targets,
        ("ensemble",),
        ("soft_targets", "unlabelled"),
        table1.soft_target_groups,
        number=2,
    ),
    Stage(
        "distilled",
        table1.distilled,
        ("ensemble", "soft_targets"),
        ("seeds", "distilled"),
        number=3,
        extends=True,
    ),
    Stage("costs", comparisons.costs_of_nets, ("ensemble", "distilled"), number=9),
    Stage("temperature", comparisons.temperature, _DISTILLED, ("temperature",), number=4),
    Stage("compression", comparisons.compression, ("ensemble",), ("seeds", *_TARGETS), number=5),
    Stage(
        "fractions",
        table5.fractions,
        ("ensemble", "soft_targets"),
        ("seeds", "fractions"),
        number=6,
        extends=True,
    ),
    Stage("unlabelled", comparisons.unlabelled, ("ensemble", "soft_targets"), ("seeds",), number=7),
    Stage("recognition", recognition.recognise, _DISTILLED, ("decoding",), number=8),
)

STUDY = Study(STAGES, write_report, check_source, published=PUBLISHED)
