"""A trained net as files that other programs run: StableHLO, ONNX, safetensors.

    net = distill_jax.load_net("runs/mnist/stages/distilled/distilled")
    export.write("student", net, images)

The folder holds net.stablehlo, net.onnx, net.safetensors, and card.json, which says what the net is and
how far each file's logits are from the net's on real inputs. The files are run by another process, which
has neither flax nor this package (`run_exported`), before the folder gets its name.

A program maps the inputs to a dict: "logits" float32 `[batch, C]`, of any batch. The scaling of bytes is
a part of it, and so are shifted biases.
"""

import contextlib
import functools
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax import export as jax_export
from numpy.typing import ArrayLike

from distill_jax import files, models, nets, ranges, run_exported
from distill_jax.errors import UserError
from distill_jax.models import Variables
from distill_jax.nets import Net
from distill_jax.specialists import inference
from distill_jax.specialists.store import Specialists

FORMATS = ("stablehlo", "onnx", "safetensors")
CARD = "card.json"
FORMAT = ("distill_jax.export", 1)
OPSET = 21
TOLERANCE = 1e-5
"""The largest difference from the net's logits, in units of the largest logit, but at least of 1."""

_PLATFORMS = ("cpu", "cuda", "tpu")
_OWN = (r"card\.json", rf"net(\.int8)?\.({'|'.join(FORMATS)})")
_AGAIN = "export the net again"

Program = Callable[[Any], dict[str, Array]]
"""`inputs [B, ...] -> outputs [B, ...]` by name."""


class File(NamedTuple):
    """A file that was written.

    difference: the largest of its logits from the net's. changed: the share of the inputs whose most
    probable class is another one.
    """

    name: str
    size: int
    difference: float
    changed: float


class Quantized(NamedTuple):
    """Weights as int8 `[..., units]` and a scale float32 `[units]`."""

    values: Array
    scale: Array


def write(
    folder: str | os.PathLike[str],
    net: Net,
    inputs: Any,
    *,
    formats: Sequence[str] = FORMATS,
    int8: bool = False,
    shift: ArrayLike | None = None,
    class_names: Sequence[str] = (),
    overwrite: bool = False,
) -> list[File]:
    """Exports one net, checks each file on real inputs, and gives the folder its name at the end.

    Args:
        folder: for the export, and nothing else.
        net: one, not several members.
        inputs: real ones `[N, ...]`, or a tree of such; a few hundred do.
        formats: of `FORMATS`. "onnx" needs the extra `export`, and arithmetic in float32.
        int8: writes StableHLO and safetensors with weights of 8 bits too (`quantize`), whose difference
            is measured, and may be anything.
        shift: float `[C]`, added to the logits: biases shifted for a transfer set without some classes.
        class_names: C names, for the card.
        overwrite: replaces another export, in one step.

    Returns:
        The files, in the order of the formats.

    Raises:
        UserError: for a folder that holds anything else, or an export; a net of several members, inputs
            or a shift that don't fit; a missing package; a file whose logits are not the net's.
    """
    if net.members is not None:
        raise UserError(f"there are {net.members} nets: export one, such as net.member(0)")
    for name in formats:
        ranges.check_value("format", name, ranges.one_of(*FORMATS))
    logits = net.logits(inputs)
    if class_names and len(class_names) != logits.shape[-1]:
        raise UserError(f"there are {len(class_names)} names for {logits.shape[-1]} classes")
    added = _shift_of(shift, logits.shape[-1])
    program_of = functools.partial(_logits, net.model.apply, added)
    small = [name for name in formats if name != "onnx"] if int8 else []
    wanted = [(f"net.{name}", net.params) for name in formats]
    wanted += [(f"net.int8.{name}", quantize(net.params)) for name in small]

    def fill(place: Path) -> list[File]:
        written = []
        for name, params in wanted:
            if name.endswith(".safetensors"):
                found = _write_safetensors(place / name, program_of, params, inputs)
            else:
                program = functools.partial(program_of, params)
                found = _write_program(place / name, program, inputs)
            exact = "int8" not in name
            written.append(_compare(place / name, found, logits + added, exact))
        return written

    card = {
        "model": nets.describe(net.model),
        "parameters": models.parameter_count(net.params),
        "inputs": nets.describe_inputs(inputs),
        "classes": logits.shape[-1],
        "class_names": list(class_names),
        "shift": None if shift is None else added.tolist(),
        "fingerprint": net.fingerprint,
        "config": net.about.get("config", {}),
        "training": {
            "epochs": net.about.get("epochs"),
            "selection": net.about.get("selection"),
            "seconds": net.seconds,
            "last": net.history[-1] if net.history else {},
        },
    }
    return _fill_folder(folder, fill, card, overwrite)


def write_specialists(
    folder: str | os.PathLike[str],
    generalist: Net,
    specialists: Specialists,
    inputs: Any,
    *,
    n: int = 1,
    overwrite: bool = False,
) -> list[File]:
    """Exports a generalist with its specialists (section 5.4) as one StableHLO program.

    Its outputs are "logits" `[batch, C]` of the generalist, "active" bool `[batch, K]`, which
    specialists have a part, and "q" `[batch, C]`, the distribution that minimises Eq. 5. All specialists
    are run on each input: a compiled program can't leave some out.

    Args:
        folder, overwrite: as for `write`.
        generalist: one net, with the trunk that the specialists' features come from, if they have one.
        specialists: its own.
        inputs: real ones, what the generalist takes.
        n: as for `inference.predict`.

    Raises:
        UserError: as `write`; for specialists of another generalist.
    """
    if specialists.generalist and specialists.generalist != generalist.fingerprint:
        raise UserError(
            f"the specialists are of generalist {specialists.generalist}, not {generalist.fingerprint}"
        )
    features = features_of(generalist, specialists)
    logits = generalist.logits(inputs)
    q = inference.predict(specialists, logits, np.asarray(features(inputs)), n=n)

    def program(inputs: Any) -> dict[str, Array]:
        logits = generalist.model.apply(generalist.params, inputs)
        active, q = inference.predict_all(specialists, logits, features(inputs), n=n)
        return {"logits": logits, "active": active, "q": q}

    def fill(place: Path) -> list[File]:
        path = place / "net.stablehlo"
        found = _write_program(path, program, inputs)
        _compare(path, {"logits": found["q"]}, q)
        return [_compare(path, found, logits)]

    count = models.parameter_count((generalist.params, specialists.net.params))
    card = {
        "parameters": count,
        "inputs": nets.describe_inputs(inputs),
        "classes": logits.shape[-1],
        "specialists": np.asarray(specialists.class_sets).tolist(),
        "head": specialists.head.name,
        "n": n,
        "fingerprint": generalist.fingerprint,
        "config": generalist.about.get("config", {}),
    }
    return _fill_folder(folder, fill, card, overwrite)


def quantize(params: Any) -> Any:
    """Each kernel (two axes or more) as int8, with a scale for each entry of its last axis.

    A model's state stays as it is.

    Examples:
        >>> found = quantize({"kernel": jnp.array([[1.0, 2.0], [-2.0, 0.0]])})["kernel"]
        >>> print(found.values, found.scale * 127)
        [[  64  127]
         [-127    0]] [2. 2.]
    """

    def one(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        largest = jnp.max(jnp.abs(leaf.astype(jnp.float32)), axis=tuple(range(leaf.ndim - 1)))
        scale = jnp.where(largest > 0, largest, 1.0) / 127
        shape = (1,) * (leaf.ndim - 1) + scale.shape
        values = jnp.round(leaf.astype(jnp.float32) / scale.reshape(shape))
        return Quantized(values.astype(jnp.int8), scale)

    if isinstance(params, Variables):
        return params._replace(params=jax.tree.map(one, params.params))
    return jax.tree.map(one, params)


def dequantize(params: Any) -> Any:
    """The inverse of `quantize`, up to its rounding: float32."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return leaf
        shape = (1,) * (leaf.values.ndim - 1) + leaf.scale.shape
        return leaf.values.astype(jnp.float32) * leaf.scale.reshape(shape)

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, Quantized))


def stablehlo(program: Program, inputs: Any) -> bytes:
    """A program as StableHLO for CPUs, GPUs and TPUs, which `jax.export.deserialize` reads.

    Args:
        program: what it closes over becomes a part of it.
        inputs: for their shapes and dtypes; the program takes any number of examples.

    Raises:
        UserError: for a program that can't be traced without the number of examples.
    """
    try:
        with _without_places():
            exported = jax_export.export(jax.jit(program), platforms=_PLATFORMS)(_like(inputs))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"the model can't be exported for any batch: {_line(error)}") from error
    return bytes(exported.serialize())


def features_of(generalist: Net, specialists: Specialists) -> Callable[[Any], Any]:
    """What makes the specialists' inputs of the generalist's: nothing, or its trunk.

    Raises:
        UserError: for a generalist that has no trunk, if they take others.
    """
    takes = specialists.net.about.get("inputs")
    if takes is None or takes["shape"] == generalist.about["inputs"]["shape"]:
        return lambda inputs: inputs
    described = nets.describe(generalist.model)
    if not described or described["kind"] != "chain" or isinstance(generalist.params, Variables):
        raise UserError(
            f"the specialists take inputs {takes['shape']}, the generalist "
            f"{generalist.about['inputs']['shape']}, and has no trunk that makes them"
        )
    trunk = models.build(json.dumps(described["parts"][0]))
    head = models.head_params(generalist.params)
    params = {name: x for name, x in generalist.params.items() if name not in head}
    return lambda inputs: trunk.apply(params, inputs)


def read_card(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What an export says of itself; a UserError for a folder without one, or of another version."""
    return files.read_sealed(files.local_path(folder) / CARD, FORMAT, _AGAIN)


def _logits(
    apply: Callable[..., Array], shift: np.ndarray, params: Any, inputs: Any
) -> dict[str, Array]:
    logits = apply(dequantize(params), inputs).astype(jnp.float32)
    return {"logits": logits + shift[None] if shift.any() else logits}


def _shift_of(shift: ArrayLike | None, classes: int) -> np.ndarray:
    found = np.zeros(classes, np.float32) if shift is None else np.asarray(shift, np.float32)
    if found.shape != (classes,) or not np.isfinite(found).all():
        raise UserError(
            f"shift is {found.shape} for {classes} classes; expected finite ({classes},)"
        )
    return found


def _write_program(path: Path, program: Program, inputs: Any) -> dict[str, np.ndarray]:
    """Writes a program, and gives its outputs for the inputs, from another process."""
    written = _onnx if path.suffix == ".onnx" else stablehlo
    path.write_bytes(written(program, inputs))
    return _run(path, inputs)


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Leaves out the file and line of each operation: this machine's paths don't belong in an export."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _like(inputs: Any) -> Any:
    """The inputs' shapes, of any batch."""
    (batch,) = jax_export.symbolic_shape("batch")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), inputs)


def _onnx(program: Program, inputs: Any) -> bytes:
    """By jax2onnx; its inputs are the leaves of the tree, in order."""
    logging.getLogger("jax2onnx").setLevel(logging.ERROR)  # says which examples it can't import
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise UserError("ONNX needs the extra: pip install -e '.[export]'") from error
    leaves, tree = jax.tree.flatten(_like(inputs))

    def flat(*arrays: Array) -> Array:
        return program(jax.tree.unflatten(tree, arrays))["logits"]

    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # says of shapes what nobody asked
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its words on each convolution
            model = to_onnx(
                flat,
                leaves,
                model_name="net",
                opset=OPSET,
                input_names=list(_named(inputs)),
                output_names=["logits"],
            )
    except Exception as error:  # whatever the converter has no rule for
        raise UserError(f"the model can't be exported to ONNX: {_line(error)}") from error
    return model.SerializeToString()


def _write_safetensors(
    path: Path, program_of: Callable[..., dict[str, Array]], params: Any, inputs: Any
) -> dict[str, np.ndarray]:
    """Writes the parameters by their paths, and gives the outputs with what is read back."""
    try:
        from safetensors.numpy import load_file, save_file
    except ImportError as error:
        raise UserError("safetensors needs the extra: pip install -e '.[export]'") from error
    leaves = jax.tree.leaves_with_path(params)
    names = [jax.tree_util.keystr(at, simple=True, separator="/") for at, _ in leaves]
    save_file({n: np.asarray(leaf) for n, (_, leaf) in zip(names, leaves, strict=True)}, path)
    stored = load_file(path)
    again = jax.tree.unflatten(jax.tree.structure(params), [stored[name] for name in names])
    return jax.device_get(jax.jit(program_of)(again, inputs))


def _named(inputs: Any) -> dict[str, np.ndarray]:
    """The arrays of the inputs by the names that programs know them by."""
    return {
        "/".join(["inputs", *map(run_exported.name_of, at)]): np.asarray(leaf)
        for at, leaf in jax.tree.leaves_with_path(inputs)
    }


def _run(path: Path, inputs: Any) -> dict[str, np.ndarray]:
    """The outputs of a file, from a process of its own that has neither flax nor this package."""
    given, made = path.with_name("inputs.npz"), path.with_name("outputs.npz")
    np.savez(given, allow_pickle=False, **_named(inputs))
    command = [sys.executable, "-I", run_exported.__file__, str(path), str(given), str(made)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        reason = (ran.stderr.strip() or "it ended").splitlines()[-1]
        raise UserError(f"{path.name} was written, but can't be run: {reason}")
    with np.load(made) as stored:
        outputs = dict(stored)
    given.unlink()
    made.unlink()
    return outputs


def _compare(
    path: Path, found: Mapping[str, np.ndarray], logits: np.ndarray, exact: bool = True
) -> File:
    """What is said of a file; a UserError if its logits should be the net's and aren't."""
    difference = float(np.abs(found["logits"] - logits).max())
    most = TOLERANCE * max(1.0, float(np.abs(logits).max()))
    if exact and not difference <= most:
        raise UserError(
            f"{path.name} gives logits that differ from the net's by {difference:.2g}; at most "
            f"{most:.2g} is rounding"
        )
    changed = float(np.mean(found["logits"].argmax(-1) != logits.argmax(-1)))
    return File(path.name, path.stat().st_size, difference, changed)


def _fill_folder(
    folder: str | os.PathLike[str],
    fill: Callable[[Path], list[File]],
    card: Mapping[str, Any],
    overwrite: bool,
) -> list[File]:
    folder = files.local_path(folder)
    files.check_writable(folder.parent, "folder")
    files.check_own_folder(folder, _OWN, "an export")
    if (folder / CARD).exists() and not overwrite:
        raise UserError(f"{folder} holds an export: name another folder, or overwrite it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with files.write_whole(folder, replace=overwrite) as place:
            place.mkdir()
            written = fill(place)
            sums = {file.name: files.sha256(place / file.name) for file in written}
            described = [{**file._asdict(), "file_sha256": sums[file.name]} for file in written]
            files.write_sealed(place / CARD, FORMAT, {**card, "files": described})
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the export can't be written to {folder}: {reason}") from error
    return written


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
