"""What `import distill_jax` costs and names."""

import configparser
import importlib
import json
import pkgutil
import subprocess
import sys

import pytest
from command import ENVIRONMENT, ROOT

import distill_jax
import distill_jax.data
import distill_jax.specialists

PACKAGES = [distill_jax, distill_jax.data, distill_jax.specialists]
REPORT = "; import json, sys; print(json.dumps([time.perf_counter() - begun, sorted(sys.modules)]))"


def in_a_fresh_process(statement: str) -> tuple[float, set[str]]:
    """Seconds that a statement takes once JAX is imported, and all modules that are imported then."""
    code = f"import jax, time; begun = time.perf_counter(); {statement}{REPORT}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True)
    seconds, modules = json.loads(done.stdout)
    return seconds, {name.split(".")[0] for name in modules}


def test_importing_the_library_is_quick():
    seconds, modules = in_a_fresh_process("import distill_jax")
    assert seconds < 1
    assert not modules & {"flax", "grain", "matplotlib", "orbax", "tensorflow_datasets"}


def test_losses_import_jax_and_optax_alone():
    _, modules = in_a_fresh_process("import distill_jax; distill_jax.losses")
    assert "optax" in modules
    assert not modules & {"flax", "grain", "matplotlib", "orbax", "tensorflow_datasets"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_package_names_its_modules(package):
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    for name in package.__all__:
        found = getattr(package, name)
        assert name not in modules or found is importlib.import_module(f"{package.__name__}.{name}")
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'no'"):
        _ = package.no


def test_the_wheel_has_the_library_alone():
    """Studies and launchers are run from a checkout, and are in nobody's site-packages."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.packages.find"]["include"] == "distill_jax*"
