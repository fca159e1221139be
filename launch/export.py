"""Exports a trained net as files that other programs run.

    python -m launch.export runs/mnist/stages/distilled/distilled --out=student

Each file is run by a program without this package, and compared with the net on real inputs: a few
that the net's folder holds, or those of --inputs. The folder of specialists needs --generalist=FOLDER
besides, and gives one program, in which Eq. 5 is solved.
"""

from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from distill_jax import command, export, files, nets
from distill_jax.errors import UserError
from distill_jax.specialists import store

_OUT = flags.DEFINE_string("out", None, "Folder for the export, and nothing else.", required=True)
_FORMATS = flags.DEFINE_list("formats", list(export.FORMATS), "Formats, by comma.")
_MEMBER = flags.DEFINE_integer(
    "member", 0, "Which net, where several were trained together.", lower_bound=0
)
_INT8 = flags.DEFINE_bool("int8", False, "Also StableHLO and safetensors with weights of 8 bits.")
_INPUTS = flags.DEFINE_string("inputs", None, "FILE.npy of real inputs to compare on.")
_SHIFT = flags.DEFINE_list("shift", [], "What is added to the logits: CLASS:NUMBER, by comma.")
_CLASS_NAMES = flags.DEFINE_string("class_names", None, "File with a class's name in each line.")
_GENERALIST = flags.DEFINE_string("generalist", None, "Folder of the specialists' generalist.")
_N = flags.DEFINE_integer(
    "n", 1, "Classes of the generalist that make a specialist active.", lower_bound=1
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replaces another export in --out.")


def main(folder: str) -> None:
    """Exports the net of a folder, and prints what was written."""
    path = files.local_path(folder)
    written = _specialists(path) if store.exists(path) else _net(path)
    for file in written:
        print(
            f"{file.name}: {file.size} bytes, logits within {file.difference:.2g} of the net's, "
            f"{100 * file.changed:.2f} % of predictions changed"
        )
    print(f"{_OUT.value}: {len(written)} files, and {export.CARD}")


def _net(folder: Path) -> list[export.File]:
    net = nets.load_net(folder, _MEMBER.value)
    return export.write(
        _OUT.value,
        net,
        _inputs(folder),
        formats=_FORMATS.value,
        int8=_INT8.value,
        shift=_shift(net.about["num_classes"]),
        class_names=_class_names(),
        overwrite=_OVERWRITE.value,
    )


def _specialists(folder: Path) -> list[export.File]:
    if _GENERALIST.value is None:
        raise UserError(f"{folder} holds specialists: name their generalist by --generalist=FOLDER")
    generalist = files.local_path(_GENERALIST.value)
    return export.write_specialists(
        _OUT.value,
        nets.load_net(generalist, _MEMBER.value),
        store.load(folder),
        _inputs(generalist),
        n=_N.value,
        overwrite=_OVERWRITE.value,
    )


def _inputs(folder: Path) -> Any:
    if _INPUTS.value is not None:
        return files.read_array(files.local_path(_INPUTS.value))
    inputs = nets.load_inputs(folder)
    if inputs is None:
        raise UserError(f"{folder} holds no inputs to compare on: name some by --inputs=FILE.npy")
    return inputs


def _shift(classes: int) -> np.ndarray | None:
    if not _SHIFT.value:
        return None
    shift = np.zeros(classes, np.float32)
    for text in _SHIFT.value:
        name, _, number = text.partition(":")
        try:
            place, value = int(name), float(number)
        except ValueError as error:
            raise UserError(f"--shift has {text!r}; expected CLASS:NUMBER, as 3:2.5") from error
        if not 0 <= place < classes:
            raise UserError(f"--shift names class {place}; there are 0 to {classes - 1}")
        shift[place] = value
    return shift


def _class_names() -> list[str]:
    if _CLASS_NAMES.value is None:
        return []
    path = files.local_path(_CLASS_NAMES.value)
    if not path.is_file():
        raise UserError(f"--class_names={path}: no such file")
    return path.read_text().splitlines()


if __name__ == "__main__":
    command.run(main, "the net's folder")
