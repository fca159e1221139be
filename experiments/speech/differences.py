"""How far nets are apart on the same test utterances, with confidence intervals."""

from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from experiments.common.study import Row, make_row
from experiments.speech import intervals


def rows(
    config: ConfigDict,
    metric: str,
    counts: Mapping[str, np.ndarray],
    sizes: np.ndarray,
    *,
    selection: str | None = None,
) -> list[Row]:
    """How far the baseline, the ensemble and the students are apart on the same utterances.

    Args:
        config: of the study.
        metric: a percentage; more is better for an accuracy, less for an error rate.
        counts: by row, of the baseline, the ensemble and the students in that order, int `[M, U]`: what
            each net has right, or wrong, of each utterance.
        sizes: frames, or words, of each utterance `[U]`.
        selection: as for `make_row`.
    """
    baseline, ensemble, student = counts
    found = []
    for better, worse in ((ensemble, baseline), (student, baseline), (ensemble, student)):
        first, second = (better, worse) if "accuracy" in metric else (worse, better)
        # A value for each net of the side that has several; of both, for each student.
        a, b = counts[first], counts[second]
        varied = a - b.mean(axis=0) if len(b) == 1 or first == student else a.mean(axis=0) - b
        found.append(
            make_row(
                config,
                "speech_differences",
                f"{first} less {second}",
                metric,
                100.0 * varied.sum(axis=1) / sizes.sum(),
                seconds=0.0,
                selection=selection,
                interval=intervals.percent(varied.mean(axis=0), sizes),
            )
        )
    return found
