"""Any teacher: an ONNX file, run by onnxruntime, teaches a JAX student on the embedded MNIST.

    pip install -e '.[onnx]'
    python -m experiments.onnx_teacher                         # trains and writes a teacher first
    python -m experiments.onnx_teacher --teacher=FILE.onnx     # yours

All that is asked of a teacher is a NumPy array: its logits, in the order of the examples. They are kept
in the working directory; if they are another teacher's, or of other examples, that is an error.
"""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from distill_jax import files, models, optimizers, soft_targets, step_losses, train_step
from distill_jax.command import run
from distill_jax.data import images
from distill_jax.data.augment import jitter
from distill_jax.data.images import Examples
from distill_jax.epochs import make_epoch, steps_per_epoch
from distill_jax.errors import UserError

INPUTS = ((28, 28), (1, 28, 28), (784,))
CLASSES, BATCH_SIZE, TEACHER_EPOCHS, STUDENT_EPOCHS = 10, 250, 12, 60
TEMPERATURE, HARD_WEIGHT = 20.0, 0.0

Teacher = Callable[[np.ndarray], np.ndarray]
"""Images uint8 `[N, 28, 28]` -> logits float32 `[N, 10]`."""


def main(teacher_file: str | None, workdir: Path, k: int, count: int) -> None:
    """Prints the test errors of the teacher, and of a student of `count` images without and with it."""
    data = images.load("embedded")
    file = files.local_path(teacher_file or workdir / "teacher.onnx")
    files.check_writable(workdir, "--workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    for package in ("onnx", "onnxruntime"):  # before any training
        _require(package)
    if teacher_file is None and not file.exists():
        net = models.mlp((800, 800), CLASSES, input_dropout=0.1, hidden_dropout=0.3)
        params = train(net, data.train, step_losses.label_loss, TEACHER_EPOCHS, shift=2)
        write_onnx(file, [params[layer] for layer in ("hidden_0", "hidden_1", "output")])

    teacher = open_teacher(file)  # from here on the file is all there is of it
    _report(f"teacher {file}", teacher(data.test["inputs"]), data.test)
    examples = {name: field[:count] for name, field in data.train.items()}
    taught, soft_loss = join(teacher, fingerprint(file), examples, workdir, k)
    student = models.mlp((300, 300), CLASSES)
    ways = ("labels", examples, step_losses.label_loss), ("soft targets", taught, soft_loss)
    for name, fields, loss in ways:
        params = train(student, fields, loss, STUDENT_EPOCHS)
        logits = soft_targets.logits_over(student.apply, params, data.test["inputs"])
        _report(f"student, {len(examples['id'])} {name}", logits, data.test)


def open_teacher(file: Path) -> Teacher:
    """A function that runs an ONNX file, its first output, in batches.

    Raises:
        UserError: naming the file, if onnxruntime can't run it, or for another input or output.
    """
    onnxruntime = _require("onnxruntime")
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own have no base class in common
        raise UserError(f"{file} is not a model that onnxruntime can run: {error}") from error
    inputs, output = session.get_inputs(), session.get_outputs()[0].name
    fitting = [x for x in inputs if x.type == "tensor(float)" and tuple(x.shape[1:]) in INPUTS]
    if len(inputs) != 1 or fitting != inputs or isinstance(inputs[0].shape[0], int):
        raise UserError(
            f"{file} takes {', '.join(f'{x.name} {x.type} {x.shape}' for x in inputs)}; expected one "
            "input, tensor(float) [N, 28, 28], [N, 1, 28, 28] or [N, 784] with N left open"
        )

    def run(images: np.ndarray) -> np.ndarray:
        pixels = images.reshape(-1, *inputs[0].shape[1:])
        batches = np.split(pixels, range(BATCH_SIZE, len(pixels), BATCH_SIZE))
        feeds = ({inputs[0].name: batch / np.float32(255)} for batch in batches)
        try:
            logits = np.concatenate([session.run([output], feed)[0] for feed in feeds])
        except Exception as error:
            raise UserError(f"{file} fails on images {list(pixels.shape)}: {error}") from error
        if (logits.shape, logits.dtype) != ((len(images), CLASSES), np.float32):
            raise UserError(
                f"{file} gives {output} {logits.dtype} {list(logits.shape)} for {len(images)} images; "
                f"expected logits, float32 [{len(images)}, {CLASSES}]"
            )
        if (logits >= 0).all() and np.allclose(logits.sum(axis=1), 1, atol=1e-3):
            raise UserError(f"{file} gives probabilities; expected logits, or their logarithms")
        return logits

    return run


def fingerprint(file: Path) -> str:
    """16 hex digits of the SHA-256 of an ONNX file, and of weights that lie beside it."""
    beside = file.with_name(file.name + ".data")  # where PyTorch's exporter puts them
    parts = [part.read_bytes() for part in (file, beside) if part.exists()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def join(
    teacher: Teacher, name: str, examples: Examples, workdir: Path, k: int
) -> tuple[Examples, train_step.Loss]:
    """Examples with soft targets, which are made and kept in `workdir` once, and the loss for them.

    `name` is the teacher's fingerprint. All logits are kept for k = 0, and serve any temperature; else
    the k largest probabilities, for teachers of very many classes.

    Raises:
        UserError: if the soft targets in `workdir` are another teacher's, or of other examples.
    """
    images = examples["inputs"]
    how: dict[str, Any] = {"encoding": "top_k", "k": k, "temperatures": TEMPERATURE} if k else {}
    folder = workdir / (f"top_{k}" if k else "soft_targets")
    soft_targets.write(
        folder,
        lambda rows: teacher(images[rows]),
        soft_targets.digests(images),
        teacher=name,
        data={"images": "embedded MNIST"},
        ids=examples["id"],
        num_classes=CLASSES,
        **how,
    )
    store = soft_targets.load(folder, teacher=name, num_classes=CLASSES)
    taught = soft_targets.attach(examples, store, TEMPERATURE)
    if k:
        return taught, step_losses.top_k_distillation_loss(store.tail_weights[TEMPERATURE])
    return taught, step_losses.distillation_loss


def train(
    model: models.Model, examples: Examples, loss: train_step.Loss, epochs: int, shift: int = 0
) -> models.Params:
    """A trained net's parameters; an epoch is one program. Images jitter by `shift` pixels."""
    steps = epochs * steps_per_epoch(len(examples["label"]), BATCH_SIZE)
    optimizer = optimizers.adam(optimizers.cosine(steps, warmup_steps=steps // 10))
    step = train_step.make_train_step(
        model, optimizer, loss, transforms=[jitter(shift)] if shift else []
    )
    run_epoch = jax.jit(make_epoch(step, BATCH_SIZE), donate_argnums=0)
    hyper = {"learning_rate": 2e-3, "temperature": TEMPERATURE, "hard_weight": HARD_WEIGHT}
    resident = {name: jnp.asarray(field) for name, field in examples.items()}
    state = train_step.init_state(model, optimizer, jax.random.key(0), resident["inputs"][:1])
    for _ in range(epochs):
        state, _metrics = run_epoch(state, resident, jax.random.key(1), hyper, None)
    return state.params


def write_onnx(file: Path, layers: Sequence[models.Params]) -> None:
    """Writes layers of `models.mlp`, {"kernel", "bias"} each, as ONNX of pixels `[N, 28, 28]`."""
    onnx = _require("onnx")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    weights, nodes, x = [], [helper.make_node("Flatten", ["inputs"], ["pixels"])], "pixels"
    for i, layer in enumerate(layers):
        named = {f"{name}_{i}": np.asarray(layer[name]) for name in ("kernel", "bias")}
        weights += [onnx.numpy_helper.from_array(array, name) for name, array in named.items()]
        nodes.append(helper.make_node("Gemm", [x, *named], [f"z_{i}"]))
        nodes.append(helper.make_node("Relu", [f"z_{i}"], [x := f"hidden_{i}"]))
    nodes.pop()  # no ReLU after the last
    nodes[-1].output[0] = "logits"
    image = helper.make_tensor_value_info("inputs", float32, ["N", 28, 28])
    logits = helper.make_tensor_value_info("logits", float32, ["N", len(layers[-1]["bias"])])
    graph = helper.make_graph(nodes, "mlp", [image], [logits], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    file.write_bytes(model.SerializeToString())


def _report(name: str, logits: np.ndarray, examples: Examples) -> None:
    wrong = np.count_nonzero(logits.argmax(axis=1) != examples["label"])
    print(f"{name}: {wrong} test errors of {len(logits)}", flush=True)


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"no {package}: pip install -e '.[onnx]'") from error


if __name__ == "__main__":  # flags are defined here, so that the functions can be imported anywhere
    _TEACHER = flags.DEFINE_string(
        "teacher", None, "ONNX: pixels 0..1 [N, 28, 28] or [N, 784] to logits; else one is trained."
    )
    _WORKDIR = flags.DEFINE_string(
        "workdir", "runs/onnx_teacher", "Keeps teacher and soft targets."
    )
    _K = flags.DEFINE_integer("k", 0, "Soft targets kept of an example; 0: all.", 0, CLASSES)
    _COUNT = flags.DEFINE_integer("examples", 6000, "That students see.", BATCH_SIZE, 60_000)
    run(lambda: main(_TEACHER.value, files.local_path(_WORKDIR.value), _K.value, _COUNT.value))
