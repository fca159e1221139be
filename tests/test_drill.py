"""The parts of the drill that choose moments and compare rows."""

import itertools
import random

from drill import START, Kill, choose, deal, differences, phase_of

LENGTHS = {START: 4.0, "teacher": 10.0, "empty": 0.0, "report": 2.0}


def test_the_moments_are_spread_over_all_phases():
    kills = choose(LENGTHS, 32, random.Random(0))
    assert len(kills) == 32
    assert all(0 <= kill.delay < LENGTHS[kill.phase] for kill in kills)
    counts = {phase: sum(kill.phase == phase for kill in kills) for phase in LENGTHS}
    assert counts == {START: 8, "teacher": 20, "empty": 0, "report": 4}
    assert kills == choose(LENGTHS, 32, random.Random(0)) != choose(LENGTHS, 32, random.Random(1))


def test_every_kill_is_dealt_once_and_later_phases_come_later():
    kills = choose(LENGTHS, 32, random.Random(0))
    dealt = deal(kills, 10, random.Random(0))
    assert len(dealt) == 4 and sorted(itertools.chain(*dealt)) == sorted(kills)
    for run in dealt:
        late = [kill for kill in run if kill.phase != START]
        assert late == sorted(late, key=kills.index) and len(run) == 8
    assert any(run[0].phase != START for run in dealt)  # resumed runs have start-ups too
    assert deal([Kill("teacher", 1.0)], 10, random.Random(0)) == [[Kill("teacher", 1.0)]]


def test_the_phase_is_what_the_output_says():
    phases = [START, "teacher", "student", "report"]
    output = "teacher: running\nteacher: 1/2, step 20\n"
    assert phase_of("", phases) == START
    assert phase_of(output, phases) == "teacher"
    assert phase_of("teacher: finished before\n", phases) == START
    output += "teacher: done in 3 s\nstudent: running\n"
    assert phase_of(output, phases) == "student"
    assert phase_of(output + "student: done in 3 s\n", phases) == "report"
    assert phase_of("student: finished before\n", phases) == "report"


def test_rows_are_compared_bit_for_bit_but_for_times():
    row = {"table": "t", "row": "r", "metric": "m", "value": 0.1, "seconds": 1.0}
    timed = {**row, "metric": "training_seconds"}
    assert differences([{**row, "seconds": 2.0}, {**timed, "value": 0.2}], [row, timed]) == []
    assert differences([row], [row, row]) == ["1 rows instead of 2"]
    assert differences([{**row, "value": 0.1 + 2e-17}], [row]) == [
        "t, r, m: value 0.10000000000000002 instead of 0.1"
    ]
    assert differences([{**row, "source": "other"}], [row]) == [
        "t, r, m: source 'other' instead of None"
    ]
