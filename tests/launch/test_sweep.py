"""Sweeps, and the jobs they run: as processes, as arrays of Slurm, or printed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ROOT, SMOKE, fails, run

from distill_jax.errors import UserError
from experiments.common.config import product, zipped
from experiments.common.study import read_json
from experiments.mnist.config import get_config
from launch import backends
from launch.backends import Job
from launch.sweep import apply_point, check_command, load_sweep, point_names, rounds

TINY = (
    SMOKE,
    "--config.data.train_examples=300",
    "--config.data.test_examples=200",
    "--config.teacher.hidden=(16,)",
    "--config.teacher.epochs=1",
    "--config.distilled.hidden=(8,)",
    "--config.distilled.epochs=1",
    "--config.seeds=(0,)",
    "--stages=teacher,soft_targets,distilled",
)
POINTS = """
def sweep(name):
    points = [{"distilled.temperature": t, "distilled.hidden": (8, 4)} for t in (2.0, 4.0, 8.0)]
    return {
        "good": points,
        "typo": [{"distilled.temprature": 2.0}],
        "failing": [*points[:2], {"distilled.learning_rate": 1e38}, points[2]],
    }[name]
"""
NAMES = [f"temperature={t},hidden=(8,4)" for t in ("2.0", "4.0", "8.0")]


def test_points_of_a_sweep():
    values = {"a": [1, 2], "b": [3, 4]}
    assert product(values) == [{"a": a, "b": b} for a in (1, 2) for b in (3, 4)]
    assert zipped(values) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]


def sweep(tmp_path: Path, name: str, *more: str) -> tuple[str, ...]:
    (tmp_path / "sweep.py").write_text(POINTS)
    named = f"--sweep={tmp_path / 'sweep.py'}:{name}"
    return (*TINY, named, f"--workdir={tmp_path / 'runs, all'}", *more)


def test_a_point_is_checked_against_the_config(tmp_path):
    (tmp_path / "sweep.py").write_text(POINTS)
    (point,) = load_sweep(f"{tmp_path / 'sweep.py'}:typo")
    config = get_config("smoke").lock()
    with pytest.raises(UserError, match=r"no field 'distilled\.temprature', which the sweep sets"):
        apply_point(config, point)
    assert apply_point(config, {"distilled.temperature": 4}).distilled.temperature == 4.0
    assert config.distilled.temperature == 20.0
    with pytest.raises(UserError, match=r"sets distilled\.temperature to 'hot'"):
        apply_point(config, {"distilled.temperature": "hot"})


def test_points_side_by_side(tmp_path):
    """One that fails stops no other, and all but it are joined afterwards."""
    runs, failing = tmp_path / "runs, all", "learning_rate=1e+38"
    message = fails(*sweep(tmp_path, "failing", "--at_once=3"), module="launch.sweep")
    assert message == f"error: 1 of 4 failed: {failing} ({runs / failing / 'log.txt'})"
    logs = {name: (runs / name / "log.txt").read_text() for name in (*NAMES, failing)}
    assert "the loss of member 0" in logs[failing]
    assert [name for name, log in logs.items() if "teacher: running" in log] == NAMES[:1]
    assert sum("teacher: reused from" in log for log in logs.values()) == 3

    left = run(*sweep(tmp_path, "failing", "--backend=print"), module="launch.sweep")
    (line,) = left.splitlines()
    assert shlex.split(line)[1:] == [
        *("-m", "launch.main", SMOKE, f"--workdir={runs / failing}"),
        *(flag.replace("'", "") for flag in TINY if flag.startswith("--config.")),
        "--config.distilled.learning_rate=1e+38",
        *(TINY[-1], f"--reuse={runs}"),
    ]

    table = run(*sweep(tmp_path, "good"), module="launch.sweep")
    assert " | ".join(NAMES) in table and "started" not in table
    rows = read_json(runs / "sweep.json")
    students = [row["point"] for row in rows if row["row"].startswith("distilled")]
    expected = [{"distilled.temperature": t, "distilled.hidden": [8, 4]} for t in (2.0, 4.0, 8.0)]
    assert students == expected

    other = (*sweep(tmp_path, "good", "--backend=print"), "--config.distilled.epochs=2")
    message = fails(*other, module="launch.sweep")
    assert "distilled.epochs is 1 there and 2 now" in message


def test_what_points_share_is_made_once():
    """Two teachers, each with two students: the teachers side by side, then the other students."""
    wanted = [{teacher, teacher + student} for teacher in "ab" for student in "xy"]
    assert rounds(wanted) == [[0, 2], [1, 3]]
    assert rounds([{"a", "b"}, {"b"}, {"a"}, {"c"}]) == [[0, 3], [1, 2]]
    assert rounds([set(), set(), {"a"}]) == [[0, 1, 2]]


def test_points_have_names_of_their_own():
    assert point_names([{"a.x": 1.0, "b.y": (1, 2)}]) == ["x=1.0,y=(1,2)"]
    assert point_names([{"a.x": 1}, {"b.x": 1}]) == ["a.x=1", "b.x=1"]
    assert point_names([{"a.x": 1, "b.x": 2}, {"a.x": 2, "b.x": 1}]) == [
        "a.x=1,b.x=2",
        "a.x=2,b.x=1",
    ]
    (name,) = point_names([{"a.x": "a/b c|d\n"}])
    assert name == "x=a_bc_d_"
    names = point_names([{"a.x": "é" * 300}, {"a.x": "é" * 301}])
    assert len(set(names)) == 2 and all(len(name.encode()) <= 200 for name in names)
    with pytest.raises(UserError, match=r"two points of the sweep are a\.x=b_c; they must differ"):
        point_names([{"a.x": "b/c"}, {"a.x": "b_c"}])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize(
    ("overrides", "good"),
    [
        ({"distilled.temperature": 1e-7, "sweep.widths": (128,)}, True),
        ({"selection": "validation", "data.data_dir": "a, b\n'c' \"d\" $e", "seeds": (0, 1)}, True),
        ({"mesh.data": -1, "data.source": "tfds:a/b"}, True),
        ({"sweep.widths": (None,)}, True),
        ({"data.data_dir": None}, False),
    ],
)
def test_values_that_flags_can_not_carry_are_refused(overrides, good):
    config = apply_point(get_config("smoke").lock(), overrides)
    words = ["python", SMOKE, *(f"--config.{key}={value}" for key, value in overrides.items())]
    if good:
        check_command(words, config)
    else:
        with pytest.raises(UserError, match=r"when given as flags: --config\.data\.data_dir=None"):
            check_command(words, config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("syntax.py:a", "syntax.py, line 1"),
        ("raises.py:a", r"KeyError: 'a' \(.*raises.py, line 2\)"),
        ("none.py:a", "has no function sweep"),
        ("empty.py:a", "expected a list of"),
        ("missing.py:a", "no file"),
        ("syntax.py", "expected FILE:NAME"),
    ],
)
def test_mistakes_in_the_file_of_a_sweep_are_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    Path("syntax.py").write_text("def sweep(:\n")
    Path("raises.py").write_text("def sweep(name):\n    return {}[name]\n")
    Path("none.py").write_text("")
    Path("empty.py").write_text("def sweep(name):\n    return []\n")
    with pytest.raises(UserError, match=f"^--sweep={name}: .*{message}") as raised:
        load_sweep(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "either --sweep=FILE:NAME or --parts=STAGE:N"),
        (("--parts=teacher:2",), "not of teacher; this study has none"),
    ],
)
def test_mistakes(tmp_path, flags, message):
    assert message in fails(SMOKE, f"--workdir={tmp_path}", *flags, module="launch.sweep")


def shell(tmp_path: Path, name: str, script: str) -> Job:
    return Job(name, ("bash", "-c", script), tmp_path / name / "log.txt")


def test_jobs_at_a_time_share_the_gpus(tmp_path, monkeypatch):
    jobs = [shell(tmp_path, str(i), "echo $CUDA_VISIBLE_DEVICES; sleep 0.5") for i in range(3)]
    for listed, shares in (("0,1,4,5,7", ["0,5", "1,7", "4"]), ("0,1", ["0,1"] * 3)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        backends.run_here([jobs], 3)
        assert [job.log.read_text().split()[-1] for job in jobs] == shares


def test_printed_commands_are_what_would_be_run(tmp_path, capsys):
    scripts = [f"echo \"it's $((40 + {i}))\" >'{tmp_path}/a b {i}'" for i in range(3)]
    jobs = [shell(tmp_path, str(i), script) for i, script in enumerate(scripts)]
    backends.print_commands([jobs[:1], jobs[1:]])
    for i, line in enumerate(capsys.readouterr().out.splitlines()):
        subprocess.run(line, shell=True, check=True)
        assert (tmp_path / f"a b {i}").read_text() == f"it's {40 + i}\n"


def test_so_many_jobs_at_a_time_and_one_round_after_the_other(tmp_path, capsys):
    """Jobs that note in one file when they begin and end."""
    notes = tmp_path / "notes"
    script = "echo + >>{0}; echo here; sleep 0.3; echo - >>{0}; exit {1}"
    jobs = [shell(tmp_path, f"job{i}", script.format(notes, 3 if i == 2 else 0)) for i in range(6)]
    with pytest.raises(UserError) as raised:
        backends.run_here([jobs[:1], jobs[1:]], 2)
    assert str(raised.value) == f"1 of 6 failed: job2 ({tmp_path / 'job2/log.txt'})"
    marks = notes.read_text().split()
    at_work = [marks[:i].count("+") - marks[:i].count("-") for i in range(len(marks) + 1)]
    assert at_work[:3] == [0, 1, 0] and max(at_work) == 2 and len(marks) == 12
    assert all(job.log.read_text() == "here\n" for job in jobs)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "started" in line] == [f"job{i}: started" for i in range(6)]
    assert len([line for line in lines if "finished after" in line]) == 5
    assert "job2: failed with status 3 after 0 s" in lines


def test_a_sigterm_is_passed_on_and_waited_for(tmp_path):
    job = "trap 'echo saved; exit 75' TERM; echo ready; sleep 60 & wait"
    program = (
        "import sys; from pathlib import Path\n"
        "from distill_jax.errors import Stopped; from launch import backends\n"
        f"jobs = [backends.Job(str(i), ['bash', '-c', {job!r}], Path({str(tmp_path)!r}) / str(i))"
        " for i in range(3)]\n"
        "try:\n    backends.run_here([jobs], 2)\n"
        "except Stopped as error:\n    sys.exit(str(error))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    logs = [tmp_path / str(i) for i in range(3)]
    limit = time.monotonic() + 60
    while not all(log.exists() and log.read_text() for log in logs[:2]):
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1] == b"stopped by SIGTERM\n"
    assert [log.exists() and log.read_text() for log in logs] == ["ready\nsaved\n"] * 2 + [False]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands, that note their words; sbatch's jobs stay in the queue."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    calls.touch()
    note = (
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]\n"
        f"open({str(calls)!r}, 'a').write(json.dumps(words) + '\\n')\n"
    )
    queue = tmp_path / "queue"
    extra = {
        "squeue": f"print(open({str(queue)!r}).read() if os.path.exists({str(queue)!r}) else '')",
        "sbatch": f"number = 40 + len(open({str(calls)!r}).readlines()); print(f'{{number}};here')",
        "scontrol": "",
        "srun": "os.execvp(sys.argv[2], sys.argv[2:])",
    }
    for name, program in extra.items():
        (programs / name).write_text(note + program + "\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return lambda: [json.loads(line) for line in calls.read_text().splitlines()]


def test_rounds_are_arrays_of_slurm_and_their_tasks_the_jobs(tmp_path, slurm, capfd):
    workdir = tmp_path / "runs"
    jobs = [
        shell(tmp_path, f"job{i}", f"echo \"job $0 '{i}'\" a; exit {75 if i == 2 else 0}")
        for i in range(4)
    ]
    backends.submit([jobs[:1], jobs[1:]], 2, workdir)
    squeue, first, second = slurm()
    name = first[2]
    assert name.startswith("--job-name=distill_jax-") and squeue[3] == "--name=" + name[11:]
    array, path = str(ROOT / "launch/array.sbatch"), str(workdir / "jobs.txt")
    common = ["sbatch", "--parsable", name, f"--output={workdir}/slurm-%A_%a.txt"]
    assert first == [*common, "--array=1-1%2", array, path]
    assert second == [*common, "--dependency=afterany:42", "--array=2-4%2", array, path]

    for number in range(1, 5):
        # Slurm gives the last task the number of the whole array; requeueing that would requeue all.
        own = {"SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": str(number), "SLURM_JOB_ID": "99"}
        environment = {**os.environ, **own}
        capfd.readouterr()
        status = subprocess.run(["bash", array, path], env=environment, check=False).returncode
        assert capfd.readouterr().out == f"job bash '{number - 1}' a\n"
        assert status == (75 if number == 3 else 0)
    assert [call for call in slurm() if call[0] == "scontrol"] == [["scontrol", "requeue", "99_3"]]


def test_jobs_in_the_queue_are_not_submitted_again(tmp_path, slurm, capsys):
    (tmp_path / "queue").write_text("7_1 RUNNING\n7_[2-3] PENDING")
    backends.submit([[shell(tmp_path, "job", "true")]], None, tmp_path)
    assert [call[0] for call in slurm()] == ["squeue"]
    assert capsys.readouterr().out == "in the queue: 7_1 RUNNING, 7_[2-3] PENDING\n"
    assert not (tmp_path / "jobs.txt").exists()


def test_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no Slurm on this machine: squeue isn't there"):
        backends.submit([[shell(tmp_path, "job", "true")]], None, tmp_path)
