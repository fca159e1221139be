"""A study's working directory continues to more epochs."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from distill_jax import files, processes
from experiments.common.study import (
    Stage,
    check_same,
    configs,
    hold,
    json_of,
    more_epochs,
    read_stage,
    write_json,
)


def changed_stages(config: ConfigDict, workdir: Path, stages: Sequence[Stage]) -> dict[str, bool]:
    """The stages that more epochs change, by name: whether each continues, or is run from the start.

    A stage continues if more epochs are all that it sees: one that builds on a changed stage has other
    inputs, and one that decides by its epochs which data it makes has other data.

    Raises:
        UserError: if the config differs in anything but larger fields "epochs".
    """
    there, now = configs(workdir, config)
    grew = more_epochs(there, now)
    if not grew:
        check_same(workdir, config)
    sections = {name.partition(".")[0] for name in grew}
    changed: dict[str, bool] = {}
    for stage in stages:
        if changed.keys() & {*stage.needs}:
            changed[stage.name] = False
        elif sections & {*stage.sections}:
            changed[stage.name] = stage.extends
    return changed


@processes.main_only
def extend(config: ConfigDict, workdir: Path, stages: Sequence[Stage]) -> None:
    """Gives a working directory a config of more epochs; the stages that it changes are unfinished then.

    A kill at any moment leaves a directory that the same command resumes.

    Raises:
        UserError: as `changed_stages`; or if another process is at work there.
    """
    changed = changed_stages(config, workdir, stages)
    if not changed:
        return
    with hold(workdir / "lock"):
        for name, continues in changed.items():
            directory = workdir / "stages" / name
            if read_stage(directory) is not None:
                print(f"{name}: {'continues' if continues else 'is run again from the start'}")
            files.remove(directory / "stage.json" if continues else directory)
        write_json(workdir / "config.json", json_of(config))
