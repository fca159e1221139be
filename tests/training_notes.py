"""What a finished run trained, by the notes in its folders, beside what its study lists as programs."""

import json
import re

from experiments.common import programs
from experiments.common.study import read_json

FOUND = ("special", "other", "special_count", "other_count")
"""Fields whose sizes depend on what a run found."""


def check(workdir, study_programs, config):
    """Every program that was run is listed, and no other."""
    ran, known = trained(workdir), listed(study_programs, config)
    assert ran.keys() == known.keys()
    for name, program in known.items():
        assert ran[name] == program, name


def trained(workdir):
    """By stage and folder, what was trained there, as `programs.describe` has it."""
    found = {}
    for path in sorted(
        (workdir / "stages").rglob("training.json"), reverse=True
    ):  # the first seed last
        stage, *folders = path.parent.relative_to(workdir / "stages").parts
        found[stage, _without_seed("/".join(folders))] = _of(path.parent)
    return found


def listed(study_programs, config):
    return {
        (stage, _without_seed(one.name)): _plain(programs.describe(one))
        for stage, one in study_programs(config)
    }


def _of(folder):
    note, meta = read_json(folder / "training.json")["fields"], read_json(folder / "net.json")
    fields = {}
    for name, value in note.items():
        if name.startswith("examples."):
            field, _, member = name.removeprefix("examples.").rpartition(".")
            if member.isdigit():
                fields[field][1] = True  # another member has another one
            else:
                fields[name.removeprefix("examples.")] = [str(value).rpartition(" ")[0], False]
    transforms = {name.split(".")[2] for name in note if name.startswith("recipe.transforms.")}
    return _plain(
        {
            "model": meta["model"] or "of a function",
            "members": note["members"],
            **{
                name: note[f"recipe.{name}"]
                for name in ("batch_size", "micro_batches", "report_every")
            },
            "transforms": len(transforms),
            "numbers": sorted({n.split(".")[1] for n in note if n.startswith("hyper.")}),
            "fields": fields,
        }
    )


def _plain(one):
    fields = {name: field for name, field in one["fields"].items() if name not in FOUND}
    return json.loads(json.dumps({**one, "fields": fields}))


def _without_seed(name):
    """Trainings of other seeds are the same programs."""
    return re.sub(r"seed_\d+|seeds_\d+_to_\d+", "seed", name)
