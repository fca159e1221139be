"""The ONNX teacher: onnxruntime's logits are NumPy's, and files that can't teach are named."""

import itertools
import re
import sys

import jax
import numpy as np
import onnx
import pytest
import tiny
from command import fails
from onnx import TensorProto, helper

from distill_jax.data import images
from distill_jax.errors import UserError
from experiments import onnx_teacher

SIDE, CLASSES = 28, onnx_teacher.CLASSES


def layers(units=(784, 16, 12, CLASSES), seed=0):
    random = np.random.default_rng(seed)
    return [
        {
            "kernel": random.normal(0, 0.1, (a, b)).astype(np.float32),
            "bias": random.standard_normal(b).astype(np.float32),
        }
        for a, b in itertools.pairwise(units)
    ]


def numpy_logits(net, images):
    x = images.reshape(len(images), -1).astype(np.float64) / 255
    for layer in net[:-1]:
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ net[-1]["kernel"] + net[-1]["bias"]


def write(path, nodes, inputs, output=("N", CLASSES), weights=()):
    """Writes a model of its nodes, (type, inputs, outputs, attributes), and of its inputs' shapes."""
    graph = helper.make_graph(
        [helper.make_node(kind, *names, **attributes) for kind, *names, attributes in nodes],
        "model",
        [helper.make_tensor_value_info(name, *of) for name, of in inputs.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, output)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def classifier(path, shape, kind=TensorProto.FLOAT, last="Identity"):
    """A model whose logits are 3 times the first ten pixels; the images' shape is given."""
    weights = [onnx.numpy_helper.from_array(3 * np.eye(784, CLASSES, dtype=np.float32), "kernel")]
    nodes = [
        ("Cast", ["inputs"], ["float"], {"to": TensorProto.FLOAT}),
        ("Flatten", ["float"], ["flat"], {"axis": 1}),
        ("MatMul", ["flat", "kernel"], ["z"], {}),
        (last, ["z"], ["out"], {}),
    ]
    return write(path, nodes, {"inputs": (kind, shape)}, weights=weights)


@pytest.fixture
def small(monkeypatch):
    """MNIST of 500 and 300 random images."""
    train, test = (tiny.examples(count, seed, SIDE) for seed, count in enumerate((500, 300)))
    train["id"] -= 100  # from 0 on
    data = images.Source("small", CLASSES, train, test)
    monkeypatch.setattr(images, "load", lambda name: data)
    return data


def run(capsys, file, workdir, k):
    """The command's three numbers of errors: the teacher's, by labels and by soft targets."""
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic promotes
        onnx_teacher.main(file, workdir, k, 500)
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d+", "n", line.split(": ")[1]) for line in lines] == 3 * [
        "n test errors of n"
    ]
    assert re.fullmatch("teacher .*, 500 labels.*, 500 soft targets.*", "".join(lines))
    return [int(line.split(": ")[1].split()[0]) for line in lines]


@pytest.mark.parametrize("count", [1, 250, 251, 600])
def test_a_written_net_gives_the_logits_of_numpy(tmp_path, count):
    net, images = layers(), tiny.examples(count, side=SIDE)["inputs"]
    onnx_teacher.write_onnx(tmp_path / "net.onnx", net)
    logits = onnx_teacher.open_teacher(tmp_path / "net.onnx")(images)
    assert (logits.shape, logits.dtype) == ((count, CLASSES), np.float32)
    np.testing.assert_allclose(logits, numpy_logits(net, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", onnx_teacher.INPUTS)
def test_inputs_of_any_of_three_shapes(tmp_path, shape):
    images = tiny.examples(7, side=SIDE)["inputs"]
    teacher = onnx_teacher.open_teacher(classifier(tmp_path / "a.onnx", ("N", *shape)))
    np.testing.assert_allclose(teacher(images), images.reshape(7, -1)[:, :CLASSES] * (3 / 255))


@pytest.mark.parametrize(
    "shape, kind, found",
    [
        (("N", 784), TensorProto.UINT8, r"inputs tensor\(uint8\) \['N', 784\]"),
        (("N", 32, 32), TensorProto.FLOAT, r"inputs tensor\(float\) \['N', 32, 32\]"),
        (("N", 3, 28, 28), TensorProto.FLOAT, r"\['N', 3, 28, 28\]"),
        ((8, 28, 28), TensorProto.FLOAT, r"\[8, 28, 28\]"),
        ((784,), TensorProto.FLOAT, r"\[784\]"),
        ((), TensorProto.FLOAT, r"\[\]"),
    ],
)
def test_other_inputs_are_named(tmp_path, shape, kind, found):
    nodes = [("Shape", ["inputs"], ["size"], {}), ("Cast", ["size"], ["out"], {"to": 1})]
    file = write(tmp_path / "b.onnx", nodes, {"inputs": (kind, shape)}, [None])
    with pytest.raises(UserError, match=rf"b\.onnx takes .*{found}; expected one input, tensor"):
        onnx_teacher.open_teacher(file)


def test_several_inputs_are_named(tmp_path):
    image = (TensorProto.FLOAT, ("N", 784))
    nodes = [("Add", ["a", "b"], ["out"], {})]
    file = write(tmp_path / "c.onnx", nodes, {"a": image, "b": image}, ("N", 784))
    with pytest.raises(UserError, match=r"takes a tensor\(float\) .*, b tensor.*; expected one"):
        onnx_teacher.open_teacher(file)


def test_other_outputs_are_named(tmp_path):
    images = tiny.examples(7, side=SIDE)["inputs"]
    inputs = {"inputs": (TensorProto.FLOAT, ("N", 784))}
    wide = write(tmp_path / "d.onnx", [("Relu", ["inputs"], ["out"], {})], inputs, ("N", 784))
    with pytest.raises(
        UserError,
        match=r"d\.onnx gives out float32 \[7, 784\] for 7 .* logits, float32 \[7, 10\]",
    ):
        onnx_teacher.open_teacher(wide)(images)
    sums = classifier(tmp_path / "e.onnx", ("N", 784), last="Softmax")
    with pytest.raises(UserError, match=r"e\.onnx gives probabilities; expected logits"):
        onnx_teacher.open_teacher(sums)(images)


def test_a_file_that_fails_on_images_is_named(tmp_path):
    size = onnx.numpy_helper.from_array(np.array([1, 784]), "size")  # of one image, however many
    nodes = [("Reshape", ["inputs", "size"], ["out"], {})]
    inputs = {"inputs": (TensorProto.FLOAT, ("N", 784))}
    file = write(tmp_path / "f.onnx", nodes, inputs, (None, None), [size])
    with pytest.raises(UserError, match=r"f\.onnx fails on images \[7, 784\]: "):
        onnx_teacher.open_teacher(file)(tiny.examples(7, side=SIDE)["inputs"])


def test_files_that_are_no_model_are_named(tmp_path):
    (tmp_path / "g.onnx").write_bytes(b"no model")
    for name in ("g.onnx", "missing.onnx"):
        with pytest.raises(UserError, match=rf"{name} is not a model that onnxruntime can run"):
            onnx_teacher.open_teacher(tmp_path / name)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    for package in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"no onnxruntime: pip install -e '\.\[onnx\]'"):
        onnx_teacher.open_teacher(tmp_path / "h.onnx")
    with pytest.raises(UserError, match=r"no onnx: pip install"):
        onnx_teacher.write_onnx(tmp_path / "h.onnx", layers())
    monkeypatch.setattr(onnx_teacher, "train", None)
    with pytest.raises(UserError, match=r"no onnx: pip install"):  # before any training
        onnx_teacher.main(None, tmp_path, 0, 500)


def test_the_fingerprint_is_of_the_file_and_the_weights_beside_it(tmp_path):
    file = tmp_path / "net.onnx"
    found = []
    for seed in (0, 1, 0):
        onnx_teacher.write_onnx(file, layers(seed=seed))
        found.append(onnx_teacher.fingerprint(file))
    assert found[0] == found[2] != found[1] and len(found[0]) == 16
    file.with_name("net.onnx.data").write_bytes(b"weights")
    assert onnx_teacher.fingerprint(file) != found[0]


def test_the_stores_hold_the_teachers_logits(tmp_path, small):
    net = layers()
    onnx_teacher.write_onnx(tmp_path / "net.onnx", net)
    teacher, examples = onnx_teacher.open_teacher(tmp_path / "net.onnx"), small.train
    expected = numpy_logits(net, examples["inputs"])
    taught, _ = onnx_teacher.join(teacher, "abc", examples, tmp_path, 0)
    np.testing.assert_allclose(taught["teacher_logits"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(taught["inputs"], examples["inputs"])

    taught, _ = onnx_teacher.join(teacher, "abc", examples, tmp_path, 5)
    p = np.exp(expected / onnx_teacher.TEMPERATURE)
    p /= p.sum(axis=1, keepdims=True)
    top = np.argsort(-p, axis=1)[:, :5]
    np.testing.assert_array_equal(taught["teacher_ids"], top)
    kept = np.take_along_axis(p, top, axis=1)
    np.testing.assert_allclose(taught["teacher_probabilities"].astype(np.float64), kept, rtol=0.004)


@pytest.mark.parametrize("k", [0, 5])
def test_soft_targets_of_another_teacher_or_other_images_are_an_error(tmp_path, small, k):
    examples = small.train
    assert onnx_teacher.join(teacher_of(0), "abc", examples, tmp_path, k)[0]["label"].size == 500
    with pytest.raises(UserError, match="'abc' there and 'def' now"):
        onnx_teacher.join(teacher_of(1), "def", examples, tmp_path, k)
    with pytest.raises(UserError, match=r"examples are not the inputs"):
        onnx_teacher.join(
            teacher_of(0), "abc", {**examples, "inputs": 255 - examples["inputs"]}, tmp_path, k
        )


def teacher_of(seed):
    return lambda images: numpy_logits(layers(seed=seed), images).astype(np.float32)


def test_a_student_learns_from_the_file_what_no_label_says(tmp_path, small, capsys):
    """Training labels are random; images are one of ten patterns, which the teacher tells apart."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 2, (CLASSES, SIDE, SIDE), np.uint8)
    for examples in (small.train, small.test):
        kinds = random.integers(0, CLASSES, len(examples["id"]))
        examples["inputs"][:] = 200 * patterns[kinds] + examples["inputs"] // 5
    small.test["label"][:] = kinds
    kernel = 0.1 * (patterns.reshape(CLASSES, -1).T - np.float32(0.5))
    onnx_teacher.write_onnx(tmp_path / "net.onnx", [{"kernel": kernel, "bias": np.zeros(10, "f")}])
    teacher, labels, soft = run(capsys, str(tmp_path / "net.onnx"), tmp_path, 0)
    assert teacher == 0 and soft < 10 and labels > 200


def test_without_a_file_a_teacher_is_trained_and_written(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr(onnx_teacher, "TEACHER_EPOCHS", 2)
    monkeypatch.setattr(onnx_teacher, "STUDENT_EPOCHS", 2)
    errors, *_ = run(capsys, None, tmp_path, 5)
    logits = onnx_teacher.open_teacher(tmp_path / "teacher.onnx")(small.test["inputs"])
    assert errors == np.count_nonzero(logits.argmax(axis=1) != small.test["label"])


def test_the_command_line_names_a_file_that_cannot_teach(tmp_path):
    flags = ("--teacher=README.md", f"--workdir={tmp_path}/run", "--k=5", "--examples=300")
    message = fails(*flags, module="experiments.onnx_teacher")
    assert message.startswith("error: README.md is not a model that onnxruntime can run: ")
