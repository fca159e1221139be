"""The launchers print what they run, run what they print, and end as their processes do."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import pytest
import yaml
from command import ROOT
from launchers import (
    add_tool,
    calls,
    make_tree,
    processes_of,
    run,
    start,
    wait_until,
    write_script,
)

GOLDEN = ROOT / "tests/launch/golden"
WORDS = ("mnist", "smoke", "--config.seeds=(0,)")
TPU_POD = {
    "NAME": "distill",
    "ZONE": "us-west4-a",
    "TYPE": "v5litepod-16",
    "VERSION": "v2-alpha-tpuv5-lite",
    "SHARE": "10.0.0.2:/share",
}
GKE = {"IMAGE": "registry/distill_jax", "QUEUE": "default"}
GKE_TPU = {**GKE, "ACCELERATOR": "tpu", "TYPE": "tpu-v5-lite-podslice", "TOPOLOGY": "4x4"}
GKE_TPU |= {"HOSTS": "4", "DEVICES": "4"}
GKE_GPU = {**GKE, "ACCELERATOR": "gpu", "TYPE": "nvidia-h100-80gb", "HOSTS": "2", "DEVICES": "8"}
DRY_RUNS = {
    "local": ("local.sh", {"EXTRAS": "cuda"}),
    "multi_gpu": ("multi_gpu.sh", {"GPUS": "2", "PORT": "8476"}),
    "multi_gpu_hosts": ("multi_gpu.sh", {"GPUS": "2", "PORT": "8476", "HOSTS": "a b"}),
    "multi_gpu_per_host": ("multi_gpu.sh", {"PER_HOST": "1", "PORT": "8476", "HOSTS": "a b"}),
    "tpu_pod": ("tpu_pod.sh", TPU_POD),
    "gke_jobset_tpu": ("gke_jobset.sh", GKE_TPU),
    "gke_jobset_gpu": ("gke_jobset.sh", GKE_GPU),
}


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path)


def dry_run(tree: Path, name: str, words: Sequence[str] = WORDS, **more: str) -> str:
    script, variables = DRY_RUNS[name]
    return run(tree, script, "--dry-run", *words, **{**variables, **more})


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run(tree, name):
    """UPDATE_GOLDEN=1 writes what is printed now."""
    printed = dry_run(tree, name).replace(str(tree), "/home/me/distill_jax")
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(printed)
    assert printed == golden.read_text()


AWKWARD = """--config.data.data_dir=a b, 'c' "d" $HOME `x` ~ * \\ & !"""


@pytest.mark.parametrize("name", ["local", "multi_gpu", "multi_gpu_hosts", "tpu_pod"])
def test_words_reach_the_study_as_they_are(tree, name):
    """Also by ssh, and a working directory of one's own."""
    given = (AWKWARD, "--stages=a,b", "--workdir=/x, y")
    commands = []
    for line in dry_run(tree, name, ("mnist", "smoke", *given)).splitlines():
        words = shlex.split(line)
        if words[0] in ("ssh", "gcloud"):
            words = shlex.split(words[-1 if words[0] == "ssh" else -2])
        commands += [words] if "launch.main" in words else []
    assert commands and all({*given} <= {*words} for words in commands)
    if name == "tpu_pod":
        assert "'distill:/x, y' runs" in dry_run(tree, name, ("mnist", *given))


@pytest.mark.parametrize(
    ("name", "machine", "extra"),
    [("tpu_pod", "v5e:4x4", "aot_tpu"), ("gke_jobset_gpu", "h100:16", "aot_gpu")],
)
def test_check_compiles_for_the_machine_before_anything_else(tree, name, machine, extra):
    plain = dry_run(tree, name)
    checked = dry_run(tree, name, (f"--check={machine}", *WORDS)).splitlines(keepends=True)
    assert checked[0] == f"launch/environment.sh {extra}\n"
    words = shlex.split(checked[1])
    assert words[:3] == [".venv/bin/python", "-m", "launch.main"]
    assert words[-1] == f"--compile_for={machine}"
    assert "".join(checked[2:]) == plain


def test_nothing_is_created_for_what_does_not_fit(tree):
    (tree / ".venv/installed-aot_tpu").touch()
    make_tool = '[[ "$*" == *--compile_for=v5e:4x4 ]] && exit 1'
    write_script(tree / ".venv/bin/python", f"#!/usr/bin/env bash\n{make_tool}\n")
    add_tool(tree, "bin/gcloud")
    process = start(tree, "tpu_pod.sh", "--check=v5e:4x4", *WORDS, **TPU_POD)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert not (tree / "calls.txt").exists()


def test_local_runs_what_it_prints(tree):
    add_tool(tree, ".venv/bin/python")
    printed = run(tree, "local.sh", "--dry-run", *WORDS)
    assert not (tree / "calls.txt").exists()
    assert run(tree, "local.sh", *WORDS) == ""
    _, command = [shlex.split(line) for line in printed.splitlines()]
    assert command[:2] == ["exec", ".venv/bin/python"] and calls(tree) == [["python", *command[2:]]]


# Process 1 behaves as MODE says. Process 0 prints where it runs, waits, and saves on SIGTERM.
PROCESSES = """
index=${!#}
index=${index##*,}
echo "process $index of ${*: -1} on GPU ${CUDA_VISIBLE_DEVICES-any}"
[[ $MODE == finish ]] && exit
[[ $MODE == stuck ]] && trap : TERM
[[ $MODE == stuck ]] || trap 'touch saved.$index; exit 75' TERM
touch ready.$index
until [[ $MODE != wait && $index == 1 && -e ready.0 ]]; do sleep 0.05; done
exit 3
"""
# As sshd does, runs the last word in a shell of its own.
SSH = 'exec bash -c "${!#}"'


def start_processes(tree: Path, mode: str, **variables: str) -> subprocess.Popen[str]:
    make_tree(tree, python=PROCESSES)
    given = {"GPUS": "2", "EXTRAS": "", "PORT": "8476", "MODE": mode, **variables}
    return start(tree, "multi_gpu.sh", *WORDS, **given)


def test_one_process_per_gpu(tmp_path):
    add_tool(tmp_path, "bin/nvidia-smi", "echo GPU 0; echo GPU 1; echo GPU 2")
    process = start_processes(tmp_path, "finish", GPUS="")
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert sorted(output.splitlines()) == [
        f"process {index} of --distributed=127.0.0.1:8476,3,{index} on GPU {index}"
        for index in range(3)
    ]


def test_one_process_per_host(tmp_path):
    add_tool(tmp_path, "bin/ssh", SSH)
    process = start_processes(tmp_path, "finish", HOSTS="a b", PER_HOST="1", GPUS="")
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert sorted(output.splitlines()) == [
        f"process {index} of --distributed=a:8476,2,{index} on GPU any" for index in range(2)
    ]
    printed = dry_run(tmp_path, "multi_gpu_per_host", EXTRAS="")
    assert sorted(calls(tmp_path)) == sorted(map(shlex.split, printed.splitlines()[1:]))


def test_no_gpu(tree):
    add_tool(tree, "bin/nvidia-smi", "exit 9")
    process = start(tree, "multi_gpu.sh", *WORDS)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and errors.startswith("error: nvidia-smi finds no GPU on")


def test_one_failure_stops_all(tmp_path):
    process = start_processes(tmp_path, "fail")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3 and (tmp_path / "saved.0").exists()
    assert errors == "process 1 ended with status 3; stopping the others\n"
    wait_until(lambda: not processes_of(tmp_path))


def test_what_does_not_stop_is_killed(tmp_path):
    process = start_processes(tmp_path, "stuck", GRACE="1")
    process.communicate(timeout=30)
    assert process.returncode == 3
    wait_until(lambda: not processes_of(tmp_path))


@pytest.mark.parametrize("hosts", ["", "a b"])
def test_sigterm_reaches_all(tmp_path, hosts):
    add_tool(tmp_path, "bin/ssh", SSH)
    process = start_processes(tmp_path, "wait", HOSTS=hosts, GPUS="1" if hosts else "2")
    wait_until(lambda: (tmp_path / "ready.0").exists() and (tmp_path / "ready.1").exists())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (75, "")
    assert (tmp_path / "saved.0").exists() and (tmp_path / "saved.1").exists()
    wait_until(lambda: not processes_of(tmp_path))


def test_processes_end_with_a_killed_launcher(tmp_path):
    process = start_processes(tmp_path, "wait")
    wait_until(lambda: (tmp_path / "ready.0").exists() and (tmp_path / "ready.1").exists())
    process.kill()
    process.communicate(timeout=30)
    wait_until(lambda: not processes_of(tmp_path))
    assert (tmp_path / "saved.0").exists() and (tmp_path / "saved.1").exists()


def start_study(tree: Path, *flags: str) -> subprocess.Popen[str]:
    """A small stage of the real study on two CPU processes."""
    make_tree(tree, python=f'exec {sys.executable} "$@"')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    small = ("--stages=baseline", "--config.data.train_examples=600", *flags)
    return start(
        tree,
        "multi_gpu.sh",
        *("mnist", "smoke", *small),
        **{"GPUS": "2", "EXTRAS": "", "PORT": port, "JAX_PLATFORMS": "cpu"},
        HOME=os.environ["HOME"],  # of the compiled programs
    )


def test_study_on_two_processes(tmp_path):
    process = start_study(tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert re.findall(r"process (\d) of 2 is \d+ on .* 1 of 2 devices", output)
    assert output.count("baseline: 8/8") == 1  # process 0 alone prints
    assert (tmp_path / "runs/mnist-smoke/results.json").exists()


def test_study_loses_a_process(tmp_path):
    process = start_study(tmp_path, "--config.baseline.epochs=100000")
    printed = ""
    while "baseline: 1/" not in printed:
        line = process.stdout.readline()
        assert line, process.communicate()
        printed += line
    victim = re.search(r"process 1 of 2 is (\d+)", printed)
    os.kill(int(victim[1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode in (76, 128 + signal.SIGKILL)  # whichever ends first
    wait_until(lambda: not processes_of(tmp_path))


# The file `taken` makes the next slice not to be had; `state` is what the slice is in; the study ends
# with the statuses in `statuses`, one after another, and was preempted if that is 76 or 255.
GCLOUD = """
case "$*" in
  *describe*) cat state ;;
  *create*) rm taken 2> /dev/null && exit 1; echo READY > state ;;
  *delete*) rm state ;;
  *launch.main*)
    code=$(head -n 1 statuses)
    sed -i 1d statuses
    [[ $code == 76 || $code == 255 ]] && echo PREEMPTED > state
    exit "$code" ;;
esac
"""


def run_tpu_pod(tree: Path, statuses: str, **variables: str) -> tuple[int, list[list[str]]]:
    """Returns the launcher's status, and the words of its calls to gcloud."""
    add_tool(tree, "bin/gcloud", GCLOUD)
    add_tool(tree, "bin/sleep")
    (tree / "statuses").write_text(statuses)
    (tree / "runs").mkdir()  # the only folder that isn't packed
    variables = {**TPU_POD, "TMPDIR": f"{tree}/runs", **variables}
    process = start(tree, "tpu_pod.sh", *WORDS, **variables)
    process.communicate(timeout=60)
    return process.returncode, [words for words in calls(tree) if words[0] == "gcloud"]


def verbs(gcloud_calls: list[list[str]]) -> str:
    return " ".join(words[4] for words in gcloud_calls)


def test_tpu_pod_runs_what_it_prints(tree):
    printed = dry_run(tree, "tpu_pod", TMPDIR=f"{tree}/runs")
    status, made = run_tpu_pod(tree, "0\n")
    commands = [shlex.split(line) for line in printed.splitlines()]
    assert status == 0
    assert made[1:] == [words for words in commands if words[0] == "gcloud"]
    assert made[0][4] == "describe"


def test_tpu_pod_is_reused(tree):
    (tree / "state").write_text("READY\n")
    status, made = run_tpu_pod(tree, "0\n")
    assert (status, verbs(made)) == (0, "describe scp ssh ssh ssh scp")


# The connection to a preempted slice may break before the study's own status comes through.
@pytest.mark.parametrize("lost, looks", [("76", "describe"), ("255", "describe describe")])
def test_preempted_tpu_pod_is_made_anew(tree, lost, looks):
    status, made = run_tpu_pod(tree, f"{lost}\n0\n", SPOT="1")
    runs = "create scp ssh ssh ssh"
    assert (status, verbs(made)) == (0, f"describe {runs} {looks} delete {runs} scp")
    assert all(("--spot" in words) == (words[4] == "create") for words in made)


def test_spot_tpu_pod_is_waited_for(tree):
    (tree / "taken").touch()
    status, made = run_tpu_pod(tree, "0\n", SPOT="1")
    again = "describe describe"  # what became of the first, and whether there is one now
    assert (status, verbs(made)) == (0, f"describe create {again} create scp ssh ssh ssh scp")


@pytest.mark.parametrize(("statuses", "spot"), [("1\n", "1"), ("76\n", "")])
def test_tpu_pod_ends_with_the_status_of_its_study(tree, statuses, spot):
    status, made = run_tpu_pod(tree, statuses, SPOT=spot)
    assert status == int(statuses) and "delete" not in verbs(made)


def test_gke_applies_what_it_prints(tree):
    add_tool(tree, "bin/kubectl", "[[ $1 == apply ]] && cat > applied.yaml; true")
    printed = dry_run(tree, "gke_jobset_gpu")
    assert run(tree, "gke_jobset.sh", *WORDS, **GKE_GPU) == ""
    delete, apply, document = printed.split("\n", 2)
    assert calls(tree) == [shlex.split(delete), shlex.split(apply)[:-1]]
    assert (tree / "applied.yaml").read_text().strip() == document.removesuffix("EOF\n").strip()


def documents(tree: Path, name: str, words: Sequence[str] = WORDS) -> list[dict]:
    text = dry_run(tree, name, words).partition("EOF'\n")[2].removesuffix("EOF\n")
    return [document for document in yaml.safe_load_all(text) if document]


def pod_of(jobset: dict) -> dict:
    (job,) = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


def check(document: dict) -> None:
    """Raises a ValidationError for what the cluster would refuse, or silently leave out."""
    schema = json.loads((GOLDEN / "jobset_schema.json").read_text())
    kinds = {
        "JobSet": "jobset.v1alpha2.JobSet",
        "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
    }
    schema["$ref"] = f"#/$defs/{kinds[document['kind']]}"
    jsonschema.validate(document, schema)


@pytest.mark.parametrize("name", ["gke_jobset_tpu", "gke_jobset_gpu"])
def test_jobset_fits_its_schema(tree, name):
    claim, jobset = documents(tree, name)
    check(claim)
    check(jobset)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == GKE["QUEUE"]
    (container,) = pod_of(jobset)["containers"]
    assert container["command"][:3] == ["python", "-m", "launch.main"]
    assert pod_of(jobset)["volumes"][0]["persistentVolumeClaim"] == {
        "claimName": claim["metadata"]["name"]
    }
    (job,) = jobset["spec"]["replicatedJobs"]
    by_exit = job["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (by_exit["containerName"], by_exit["values"]) == (container["name"], [75, 76])


def test_words_survive_yaml(tree):
    word = """--config.data.source=a "b" \\c 'd'\n$e: #f"""
    _, jobset = documents(tree, "gke_jobset_gpu", ("mnist", word))
    (container,) = pod_of(jobset)["containers"]
    assert word in container["command"]


@pytest.mark.parametrize(
    "path, key",
    [
        (["spec"], "sucessPolicy"),
        (["spec", "failurePolicy"], "maxRestart"),
        (["spec", "replicatedJobs", 0, "template"], "podFailurePolicy"),  # belongs into its spec
        (["spec", "replicatedJobs", 0, "template", "spec", "template", "spec"], "nodeSelectors"),
    ],
)
def test_schema_knows_misplaced_fields(tree, path, key):
    _, jobset = documents(tree, "gke_jobset_tpu")
    part = jobset
    for step in path:
        part = part[step]
    part[key] = {}
    with pytest.raises(jsonschema.ValidationError, match=key):
        check(jobset)


def test_shellcheck():
    scripts = [
        path
        for folder in ("launch", "tests")
        for pattern in ("*.sh", "*.sbatch")
        for path in (ROOT / folder).rglob(pattern)
    ]
    assert len(scripts) > 5
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run(
        [shellcheck, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
