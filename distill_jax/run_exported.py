"""Runs an exported file: by JAX and flatbuffers, or onnxruntime, and nothing of this package.

    python run_exported.py net.stablehlo inputs.npz outputs.npz

The arrays of inputs.npz are "inputs", or "inputs/NAME" of a tree; those of outputs.npz the outputs.
"""

import sys

import numpy as np


def run_stablehlo(file: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs by name of a program that `jax.export` serialized."""
    import jax
    from jax import export

    with open(file, "rb") as opened:
        program = export.deserialize(bytearray(opened.read()))
    (like,), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    names = [
        "/".join(["inputs", *map(name_of, path)]) for path, _ in jax.tree.leaves_with_path(like)
    ]
    inputs = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in names])
    return {name: np.asarray(array) for name, array in program.call(inputs).items()}


def run_onnx(file: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs by name of an ONNX file, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, arrays), strict=True))


def name_of(entry: object) -> str:
    """What a key of a tree is called, in the name of an input."""
    return str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry))))


if __name__ == "__main__":
    program, inputs, outputs = sys.argv[1:]
    run = run_onnx if program.endswith(".onnx") else run_stablehlo
    found = run(program, dict(np.load(inputs)))
    assert not {"flax", "distill_jax"} & set(sys.modules)
    np.savez(outputs, allow_pickle=False, **found)
