"""Configs with odd values, checked as `launch.main --dry-run` does: only a UserError may come out."""

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.errors import UserError
from experiments.common.config import flat
from experiments.common.extras import import_study
from experiments.common.run import plan
from experiments.custom import config as custom
from experiments.mnist import config as mnist
from experiments.specialists import config as specialists
from experiments.speech import config as speech
from launch.sweep import apply_point

NUMBERS = (0, 1, -1, 2, 7, 10**6, -4.0, 0.0, 0.5, 1.5, 200.0, math.nan, math.inf, -math.inf, True)
WORDS = (
    "",
    "best",
    "last",
    "validation",
    "bfloat16",
    "gs://bucket/x",
    "~/x",
    "a,b",
    "a\nb",
    "\0",
    "ä",
)
ODD = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.none(),
    st.lists(st.sampled_from(NUMBERS), max_size=3).map(tuple),
    st.lists(st.sampled_from(WORDS), max_size=2).map(tuple),
    st.integers(),
    st.floats(),
)


@pytest.mark.parametrize(
    "study", [custom, mnist, speech, specialists], ids=lambda study: study.__name__
)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_odd_values_are_refused_in_one_line_or_planned(study, data):
    config = study.get_config("smoke")
    names = sorted(flat(config.to_dict()))
    point = data.draw(st.dictionaries(st.sampled_from(names), ODD, min_size=1, max_size=2))
    module = import_study(config.study)
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        try:
            lines = plan(apply_point(config, point), workdir, module.STUDY)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert len(lines) == len(module.STAGES) + 1
        assert not workdir.exists()
