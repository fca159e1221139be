"""The same work as `mnist_epoch_jax`, written for PyTorch as one would by hand."""

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import nn

from experiments.benchmarks.mnist_epoch_jax import (
    CLASSES,
    EPOCHS,
    PIXELS,
    Case,
    RunEpoch,
    Work,
    load_examples,
    section,
)


def start_torch(work: Work, gpu: bool) -> tuple[Callable[[Case], RunEpoch], str]:
    """How to set a case up in this process, and the name of where it runs."""
    # Threads started later take this over; XLA flushes denormals too.
    torch.set_flush_denormal(True)
    if gpu:
        torch.set_float32_matmul_precision("high")  # TF32
        where = f"{torch.cuda.get_device_name()}, TF32 allowed in both"
    else:
        torch.set_num_threads(os.cpu_count() or 1)
        where = f"cpu, torch.set_num_threads({os.cpu_count()})"
    device = torch.device("cuda" if gpu else "cpu")
    examples = {
        name: torch.from_numpy(field).to(device, torch.int64 if name == "label" else None)
        for name, field in load_examples(work).items()
        if name != "id"
    }
    return functools.partial(_case, work, examples), f"torch {torch.__version__} on {where}"


def _case(work: Work, examples: dict[str, Any], case: Case) -> RunEpoch:
    config, device = section(case.net), examples["label"].device
    net = _net(config).to(device).train()
    # The fastest of PyTorch's three, on a CPU too: 3 to 5 times as fast as the default there.
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate, fused=True)
    steps = work.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(steps, EPOCHS * steps))
    loss = (_label_loss if case.net == "teacher" else _distillation_loss)(net, config, examples)
    hidden = [layer.weight for layer in net if isinstance(layer, torch.nn.Linear)][:-1]

    @torch.no_grad()
    def limit() -> None:
        for weight in hidden:
            weight.renorm_(2, 0, config.max_norm)

    if case.way == "pytorch_compile":
        loss, limit = torch.compile(loss), torch.compile(limit)

    def run() -> None:
        order = torch.randperm(len(examples["label"]), device=device)
        total = torch.zeros(2, device=device)
        for rows in order[: steps * work.batch_size].view(steps, -1):
            mean, errors = loss(rows)
            optimizer.zero_grad()
            mean.backward()
            optimizer.step()
            schedule.step()
            if config.max_norm:
                limit()
            total += torch.stack([mean.detach(), errors])
        total.tolist()  # waits for a GPU

    return run


def _net(config: ConfigDict) -> Any:
    """The net of a config section, initialised as ours."""
    sizes = [PIXELS, *config.hidden, CLASSES]
    rates = [config.input_dropout] + [config.hidden_dropout] * len(config.hidden)
    layers: list[Any] = []
    for i, (inputs, units) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(inputs, units)
        nn.init.kaiming_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        dropout = [nn.Dropout(rates[i])] if rates[i] else []
        layers += [*([nn.ReLU()] if i else []), *dropout, linear]
    return nn.Sequential(*layers)


def _label_loss(net: Any, config: ConfigDict, examples: dict[str, Any]) -> Callable:
    """Cross-entropy with the labels of jittered images."""
    pixels, labels = config.jitter, examples["label"]
    padded = F.pad(examples["inputs"], (pixels,) * 4)
    # A view [N, shift down, shift right, 28, 28], indexed once for the whole batch.
    shifted = padded.unfold(1, 28, 1).unfold(2, 28, 1)

    def loss(rows: Any) -> Any:
        down, right = torch.randint(0, 2 * pixels + 1, (2, len(rows)), device=rows.device)
        logits = net(shifted[rows, down, right].flatten(1).float() / 255)
        target = labels[rows]
        errors = (logits.detach().argmax(1) != target).sum()
        return F.cross_entropy(logits, target), errors

    return loss


def _distillation_loss(net: Any, config: ConfigDict, examples: dict[str, Any]) -> Callable:
    """The weighted average of soft and hard cross-entropy."""
    images, labels, teacher = (
        examples["inputs"].flatten(1),
        examples["label"],
        examples["teacher_logits"],
    )
    temperature, hard_weight = config.temperature, config.hard_weight

    def loss(rows: Any) -> Any:
        logits, target = net(images[rows].float() / 255), labels[rows]
        soft_targets = (teacher[rows] / temperature).softmax(1)
        soft = temperature**2 * F.cross_entropy(logits / temperature, soft_targets)
        mean = (1 - hard_weight) * soft + hard_weight * F.cross_entropy(logits, target)
        return mean, (logits.detach().argmax(1) != target).sum()

    return loss


def _warmup_cosine(warmup: int, steps: int) -> Callable[[int], float]:
    """The same schedule as `optimizers.cosine`."""

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / (steps - warmup))))

    return factor
