"""Who may import what, read off the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["distill_jax", "experiments", "launch"]  # each imports only those before it
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / "distill_jax")]


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """Full names of all modules and objects that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(path):
    return {name.split(".")[0] for name in imports(path)}


def names(path):
    """All identifiers and attributes, and attributes of names as "module.name"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found |= {node.attr, ast.unparse(node)}
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return found | imports(path) | {name.split(".")[-1] for name in imports(path)}


def test_the_sources_are_found():
    assert {"distill_jax/losses.py", "distill_jax/epochs.py", "launch/main.py"} <= {
        name_of(path) for path in SOURCES
    }


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_downward(path):
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    assert not packages(path) & {*LAYERS[layer + 1 :], "tests"}


def test_one_package_knows_flax():
    folders = {path.parent for path in SOURCES if "flax" in packages(path)}
    own = ROOT / "experiments" / "custom"  # where people put modules of their own
    assert folders == {ROOT / "distill_jax" / "models", own}


def test_one_file_of_the_library_names_devices():
    sharding = {"Mesh", "NamedSharding", "PartitionSpec", "pmap", "shard_map", "jax.sharding"}
    sharding |= {"with_sharding_constraint", "jax.devices", "device_put", "jax.make_mesh"}
    assert [name_of(path) for path in LIBRARY if names(path) & sharding] == [
        "distill_jax/sharding.py"
    ]


@pytest.mark.parametrize("name", ["losses", "later_losses", "multi_label", "top_k_losses"])
def test_losses_need_only_jax_and_optax(name):
    path = ROOT / "distill_jax" / f"{name}.py"
    own = {each.split(".")[1] for each in imports(path) if each.startswith("distill_jax.")}
    assert packages(path) <= {"jax", "optax", "distill_jax"}
    assert own <= {"ranges", "shapes", "losses"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_deprecated_names(path):
    deprecated = {
        "jax.tree_map",
        "jax.tree_util.tree_map",
        "PRNGKey",
        "jax.experimental.maps",
        "jax.experimental.pjit",
        "jax.experimental.shard_map",
        "jax.core",
        "jax.abstract_arrays",
        "jax.xla",
    }
    assert not names(path) & deprecated
