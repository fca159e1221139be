"""The same work as `large_output_jax` in PyTorch: as one writes it by hand, and by Liger-Kernel."""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from experiments.benchmarks.large_output_jax import Framework, Program
from experiments.benchmarks.large_output_work import (
    TEMPERATURE,
    Case,
    Gradients,
    Work,
    draw,
    hard_weight,
)
from experiments.benchmarks.measure import peak_resident

MeanLoss = Callable[[Case, Work], torch.Tensor]
"""The mean objective of a `Work` of tensors, whose kernels are `[C, D]` here."""


def start_torch() -> Framework:
    """PyTorch on a GPU if it sees one."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.set_float32_matmul_precision("high")  # TF32, which XLA allows too
        where = torch.cuda.get_device_name()
    else:
        torch.set_num_threads(os.cpu_count() or 1)
        where = f"cpu, torch.set_num_threads({os.cpu_count()})"
    return Framework(
        f"torch {torch.__version__} on {where}",
        "gpu" if gpu else "cpu",
        _build,
        _peak_on_device if gpu else peak_resident,
    )


def _build(case: Case) -> Program:
    work = _put(case._replace(way="", rows=0))
    mean_loss = WAYS[case.way]
    inputs = [work.hidden, work.kernel, *([] if case.way == "liger_jsd" else [work.bias])]

    def run() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        loss = mean_loss(case, work)
        gradients = torch.autograd.grad(loss, inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return loss, gradients

    return Program(run, functools.partial(_fetch, case, work))


@functools.cache
def _put(case: Case) -> Work:
    """The work on the device, with its layers in the case's dtype."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, case.dtype)
    work = draw(case)
    kernels = {name: getattr(work, name).T.copy() for name in ("kernel", "teacher_kernel")}
    tensors = [torch.from_numpy(x).to(device) for x in work._replace(**kernels)]
    layers = [x.to(dtype) for x in tensors[:6]]
    for x in layers[:3]:
        x.requires_grad_()
    others = [x if x.is_floating_point() else x.long() for x in tensors[6:]]
    return Work(*layers, *others)


def _by_hand(case: Case, work: Work) -> torch.Tensor:
    """The weighted average of soft and hard cross-entropy on the logits of the whole batch."""
    logits = F.linear(work.hidden, work.kernel, work.bias).float()
    soft = _stored(logits, work) if case.targets == "stored" else _teacher(logits, work)
    hard = F.cross_entropy(logits, work.label)
    weight = hard_weight(case)
    return (1 - weight) * TEMPERATURE**2 * soft + weight * hard


def _teacher(logits: torch.Tensor, work: Work) -> torch.Tensor:
    return F.cross_entropy(logits / TEMPERATURE, (_teacher_logits(work) / TEMPERATURE).softmax(1))


@torch.no_grad()
def _teacher_logits(work: Work) -> torch.Tensor:
    return F.linear(work.teacher_hidden, work.teacher_kernel, work.teacher_bias).float()


def _stored(logits: torch.Tensor, work: Work) -> torch.Tensor:
    """The other classes share the tail equally."""
    log_q = (logits / TEMPERATURE).log_softmax(1)
    named = log_q.gather(1, work.ids)
    others = log_q.shape[1] - named.shape[1]
    mean = (log_q.sum(1) - named.sum(1)) / max(others, 1)
    return -((work.probabilities * named).sum(1) + work.tail * mean).mean()


def _liger_chunked(case: Case, work: Work) -> torch.Tensor:
    """All of the objective but T squared, which goes into the weight; chunks as by its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    weight = hard_weight(case)
    mean_kl = LigerFusedLinearJSDLoss(
        weight_hard_loss=weight,
        weight_soft_loss=(1 - weight) * TEMPERATURE**2,
        beta=0.0,  # KL(teacher, student)
        temperature=TEMPERATURE,
    )
    return mean_kl(
        work.hidden,
        work.kernel,
        work.teacher_hidden,
        work.teacher_kernel,
        work.label,
        work.bias,
        work.teacher_bias,
    )


def _liger_jsd(case: Case, work: Work) -> torch.Tensor:
    """The soft half, in Triton: it has no labels and no biases."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    mean_kl = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
    kl = mean_kl(work.hidden, work.kernel, work.teacher_hidden, work.teacher_kernel, None)
    return TEMPERATURE**2 * kl


WAYS: dict[str, MeanLoss] = {
    "pytorch_eager": _by_hand,
    "pytorch_compile": torch.compile(_by_hand),
    "liger_chunked": _liger_chunked,
    "liger_jsd": _liger_jsd,
}


@torch.no_grad()
def _fetch(case: Case, work: Work, result: tuple[torch.Tensor, Any]) -> Gradients:
    loss, (hidden, kernel, *bias) = result
    if case.way.startswith("liger"):  # KL is the cross-entropy less the entropy of the targets
        loss = loss + (1 - hard_weight(case)) * TEMPERATURE**2 * _mean_entropy(work)
    gradients = (hidden, kernel.T, *bias)
    return Gradients(loss.item(), *(x.float().cpu().numpy() for x in gradients))


def _mean_entropy(work: Work) -> torch.Tensor:
    p = (_teacher_logits(work) / TEMPERATURE).softmax(1)
    return torch.special.entr(p).sum(1).mean()


def _peak_on_device(run: Callable[[], Any]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
