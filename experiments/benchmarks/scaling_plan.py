"""A model of communication, and the predicted efficiency of larger machines.

A step's time on a chip is taken as the sum of three parts that don't overlap: the matrix products (or,
if that takes longer, reading and writing their weights), the optimizer's update, the communication.
Latencies, input and evaluation are left out.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from experiments.benchmarks.mnist_epoch_jax import flops_per_example

FLOAT32, BFLOAT16 = 4, 2  # bytes
WEIGHT_BYTES = 3 * FLOAT32  # of a weight in a step: read forward and backward, its gradient written
ADAM_BYTES = 7 * FLOAT32  # of a weight in an update: it and two moments in and out, the gradient in
USED = 0.5  # share of the peak rate that large matrix products are taken to reach

ACOUSTIC = (26 * 40, *[2560] * 8, 14000)  # section 4's net, from inputs to classes


class Cluster(NamedTuple):
    """A machine, by its maker's figures for one chip.

    flops: dense bfloat16 ones a second. memory: bytes a second. link: bytes a second that a chip sends
    to others of its group of `group` chips; outside: to other groups.
    """

    name: str
    chips: int
    flops: float
    memory: float
    group: int
    link: float
    outside: float


CLUSTERS = (
    # cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 819 GB/s, a torus of 16 x 16, 4 ports of 400 Gb/s.
    # A ring along one of its axes uses two of them; all 256 chips together could use all four.
    Cluster("v5e-256", 256, 197e12, 819e9, 256, 100e9, 0.0),
    # nvidia.com/h100, SXM: 989 TFLOP/s without sparsity, 3.35 TB/s, NVLink 900 GB/s (both directions
    # together) within 8; DGX H100: one InfiniBand port of 400 Gb/s for each GPU.
    Cluster("64 x H100", 64, 989e12, 3.35e12, 8, 450e9, 50e9),
)


class Job(NamedTuple):
    """Nets to train, all of one kind, each on its own or the same examples.

    flops: of a training step, and reduced: values (activations, gradients of them) that are reduced
    over "model", both per example. examples: of an epoch. batch: of each net. parts: the sizes of
    "model" that its layers allow.
    """

    name: str
    nets: int
    parameters: int
    flops: float
    reduced: int
    examples: float
    batch: int
    parts: tuple[int, ...]


class Plan(NamedTuple):
    """A way to train a job: `at_once` nets at a time, each on a mesh of `data` x `model` chips.

    step: seconds; efficiency: share of the rate that all chips would have if they did nothing but
    matrix products; split_efficiency: if the update were split over "data" (arXiv 2004.13336); hours: of
    an epoch of all nets.
    """

    at_once: int
    data: int
    model: int
    step: float
    efficiency: float
    split_efficiency: float
    hours: float


def parameter_count(layers: Sequence[int]) -> int:
    """Weights and biases of a plain network, by its units from inputs to classes."""
    return sum((inputs + 1) * units for inputs, units in itertools.pairwise(layers))


def reduced_values(layers: Sequence[int], model: int) -> int:
    """Values per example that a step reduces over "model", if `sharding.state_shardings` splits it.

    Counted back from the output layer, a layer split by inputs reduces its outputs, forward; one split
    by units reduces the gradient of its inputs, backward, unless they are the net's inputs. The losses'
    few values are left out.
    """
    if model == 1:
        return 0
    depths = range(len(layers) - 2, -1, -1)
    total = 0
    for depth, (inputs, units) in zip(depths, itertools.pairwise(layers), strict=True):
        if depth % 2 == 1:
            total += units
        elif depth < len(layers) - 2 and (depth > 0 or units % model == 0):
            total += inputs
    return total


def step_bytes(
    layers: Sequence[int], batch: int, data: int, model: int, activation: int = FLOAT32
) -> float:
    """Bytes that each device sends in a step: gradients over "data", activations over "model".

    In rings; gradients in float32, activations of `activation` bytes each. If both sizes are above 1,
    all parameters are taken to be split over "model".
    """
    gradients = ring_bytes("all-reduce", FLOAT32 * parameter_count(layers) / model, data)
    activations = activation * batch / data * reduced_values(layers, model)
    return gradients + ring_bytes("all-reduce", activations, model)


def ring_bytes(kind: str, result: float, devices: int) -> float:
    """Bytes that each of `devices` devices sends for a collective with a result of `result` bytes."""
    shares = {
        "all-reduce": 2 * (devices - 1) / devices,
        "all-gather": (devices - 1) / devices,
        "all-to-all": (devices - 1) / devices,
        "reduce-scatter": devices - 1,
    }
    return result * shares.get(kind, 1)  # a permutation sends it once


JOBS = (
    # Ten members of the ensemble of section 4, an epoch of its 700M frames each; in bfloat16.
    *(
        Job(
            f"10 acoustic nets, batch {batch}",
            10,
            parameter_count(ACOUSTIC),
            flops_per_example(ACOUSTIC),
            reduced_values(ACOUSTIC, 2),
            700e6,
            batch,
            (1, 2, 4, 8, 16),
        )
        for batch in (1024, 8192)
    ),
    # Section 5's specialists. The paper doesn't give their net's size; here it is that of reference [7]
    # (Krizhevsky et al. 2012: 0.72 billion multiplications forward, 61M parameters) with 300 classes
    # and the dustbin. An epoch is taken to be the 2 % of JFT's 100M images that 300 of 15,000 classes
    # have on average, and as many others.
    Job("61 specialists, batch 1024", 61, 58_000_000, 6 * 0.72e9, 0, 4e6, 1024, (1,)),
)


def plans(job: Job, cluster: Cluster) -> list[Plan]:
    """Every mesh in powers of two for a job, the best first; nets that don't fit wait their turn."""
    powers = [2**i for i in range(cluster.chips.bit_length())]
    shapes = [
        (data, model)
        for data, model in itertools.product(powers, job.parts)
        if data * model <= cluster.chips and job.batch % data == 0
    ]
    found = [_plan(job, cluster, data, model) for data, model in shapes]
    return sorted(found, key=lambda plan: plan.efficiency, reverse=True)


def _plan(job: Job, cluster: Cluster, data: int, model: int) -> Plan:
    at_once = min(job.nets, cluster.chips // (data * model))
    steps = math.ceil(job.nets / at_once) * job.examples / job.batch
    ideal = job.nets * job.examples * job.flops / (cluster.chips * cluster.flops * USED)
    step, split = (_step_seconds(job, cluster, data, model, parts) for parts in (1, data))
    return Plan(
        at_once,
        data,
        model,
        step,
        ideal / (steps * step),
        ideal / (steps * split),
        steps * step / 3600,
    )


def _step_seconds(job: Job, cluster: Cluster, data: int, model: int, update_parts: int) -> float:
    """Seconds of a step of one net; its update is split over `update_parts` devices of "data"."""
    weights = job.parameters / model
    products = job.flops * job.batch / (data * model) / (cluster.flops * USED)
    passes = weights * WEIGHT_BYTES / cluster.memory
    update = weights * ADAM_BYTES / update_parts / cluster.memory
    activations = BFLOAT16 * job.reduced * job.batch / data
    reductions = _all_reduce_seconds(activations, model, 1, cluster)
    # With a split update this is a reduce-scatter and an all-gather: the same bytes.
    reductions += _all_reduce_seconds(FLOAT32 * weights, data, model, cluster)
    return max(products, passes) + update + reductions


def _all_reduce_seconds(size: float, devices: int, stride: int, cluster: Cluster) -> float:
    """An all-reduce of `size` bytes over devices `stride` apart: within groups, then between them."""
    inside = max(1, min(devices, cluster.group // stride))
    groups = devices // inside
    seconds = ring_bytes("all-reduce", size, inside) / cluster.link
    if groups > 1:
        seconds += ring_bytes("all-reduce", size / inside, groups) / cluster.outside
    return seconds
