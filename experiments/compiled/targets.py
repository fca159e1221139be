"""Machines that programs can be compiled for without having one.

TPUs by the compiler in the package libtpu, GPUs by JAX's CUDA plugin and a description of the GPU in
words, CPUs by JAX itself.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from distill_jax.errors import UserError


class Chip(NamedTuple):
    """A device, by its maker's figures.

    memory: bytes. flops: dense bfloat16 ones a second. bandwidth: bytes a second of its memory. links:
    bytes a second that it sends to others of its slice or host, over all its links together. cache:
    bytes that the hardware keeps near by itself; on a TPU the program says what is kept.
    """

    platform: str
    memory: float
    flops: float
    bandwidth: float
    links: float
    cache: int = 0


# cloud.google.com/tpu/docs: v5e, v5p, v6e, "Key chip specifications". nvidia.com: H100 and H200 SXM, HGX
# B200, without sparsity; NVLink in one direction.
CHIPS = {
    "v5e": Chip("tpu", 16e9, 197e12, 819e9, 200e9),
    "v5p": Chip("tpu", 95e9, 459e12, 2765e9, 600e9),
    "v6e": Chip("tpu", 32e9, 918e12, 1640e9, 448e9),
    "h100": Chip("gpu", 80e9, 989e12, 3.35e12, 450e9, 52428800),
    "h200": Chip("gpu", 141e9, 989e12, 4.8e12, 450e9, 52428800),
    "b200": Chip("gpu", 180e9, 2250e12, 7.7e12, 900e9, 132644864),
    "cpu": Chip("cpu", math.inf, math.nan, math.nan, math.nan),
}
_FORM = re.compile(r"(?P<chip>\w+):(?P<shape>\d+(x\d+)*)")
_PLUGINS = {"tpu": ("libtpu", "aot_tpu"), "gpu": ("jax_plugins.xla_cuda13", "aot_gpu")}

QUIET = {
    # Else libtpu queries the metadata server of Cloud TPU for the type and the workers of this VM.
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # as no TPU is opened
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
"""Environment variables by which the compilers don't look for a machine."""


class Target(NamedTuple):
    """name: as given, such as "v5e:4x4". shape: of the slice, or one number."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Devices in all."""
        return math.prod(self.shape)


def parse(names: Sequence[str]) -> list[Target]:
    """The targets of names such as "v5e:16x16", "h100:8", "cpu:8".

    Raises:
        UserError: for another form, a chip that isn't known, or a compiler that isn't installed.
    """
    found = []
    for name in names:
        match = _FORM.fullmatch(name)
        if match is None or match["chip"] not in CHIPS:
            raise UserError(
                f"--compile_for={name}: expected a chip and how many, such as v5e:4x4, h100:8 or cpu:8; "
                f"chips are {', '.join(CHIPS)}"
            )
        chip = CHIPS[match["chip"]]
        if chip.platform in _PLUGINS:
            module, extra = _PLUGINS[chip.platform]
            if not _is_installed(module):
                raise UserError(
                    f"--compile_for={name} needs the compiler of that machine: "
                    f'.venv/bin/python -m pip install -e ".[{extra}]"'
                )
        found.append(Target(name, chip, tuple(map(int, match["shape"].split("x")))))
    return found


def prepare(targets: Sequence[Target]) -> None:
    """Sets what must be set before JAX starts: nothing is run but on this machine's CPU."""
    os.environ.update(QUIET, JAX_PLATFORMS="cpu")
    counts = [target.size for target in targets if target.chip.platform == "cpu"]
    import jax

    jax.config.update("jax_num_cpu_devices", max([1, *counts]))


def devices(target: Target) -> list[Any]:
    """The devices to compile for.

    Raises:
        UserError: for a slice of a shape that the compiler doesn't know.
    """
    import jax
    from jax.experimental import topologies

    if target.chip.platform == "cpu":
        return jax.devices("cpu")[: target.size]
    try:
        if target.chip.platform == "tpu":
            found = topologies.get_topology_desc(platform="tpu", **_slice_of(target))
        else:
            found = _gpus(target)
    except (RuntimeError, ValueError) as error:  # JAX's own among them
        raise UserError(f"--compile_for={target.name}: {str(error).splitlines()[0]}") from error
    return list(found.devices)


def _slice_of(target: Target) -> dict[str, Any]:
    """A slice as the compiler is asked for it; one chip may be named without a shape, as "v5e:1"."""
    if min(target.shape[:2]) > 1:
        return {"topology_name": target.name}
    chip = target.name.partition(":")[0]
    sides = target.shape if target.size > 1 else (1,) * (3 if chip == "v5p" else 2)
    hosts = [min(side, 2) for side in sides[:2]]  # of chips, where there aren't 2 x 2
    name = f"{chip}:{'x'.join(map(str, sides))}"
    return {"topology_name": name, "chips_per_host_bounds": (*hosts, 1)}


def _gpus(target: Target) -> Any:
    import pathlib

    import jax
    import jax_plugins.xla_cuda13 as plugin
    from jax._src import xla_bridge
    from jax.experimental import topologies

    jax.devices("cpu")  # plugins that are found register themselves then
    if "cuda" not in xla_bridge._backend_factories:
        library = pathlib.Path(str(plugin.__file__)).parent / "xla_cuda_plugin.so"
        xla_bridge.register_plugin("cuda", priority=500, library_path=str(library), options=None)
    return topologies.get_topology_desc(
        "x",
        platform="cuda",
        target_config=_DESCRIPTION.format(
            **_GPUS[target.name.partition(":")[0]],
            memory=int(target.chip.memory),
            l2=target.chip.cache,
            bandwidth=int(target.chip.bandwidth),
        ),
        topology=f"1x1x{target.size}",
    )


_GPUS = {
    "h100": {
        "cores": 132,
        "clock": 1.98,
        "major": 9,
        "name": "NVIDIA H100 80GB HBM3",
    },
    "h200": {"cores": 132, "clock": 1.98, "major": 9, "name": "NVIDIA H200"},
    "b200": {"cores": 148, "clock": 1.965, "major": 10, "name": "NVIDIA B200"},
}
_DESCRIPTION = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{name}"
"""


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
