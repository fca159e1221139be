"""What the studies' config files are built from: the section of a net, and sweeps.

Nothing here imports JAX: configs are read before it is set up.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Overrides = dict[str, Any]
"""Dotted config keys and their values: one point of a sweep."""


def product(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Every combination: `product({"a": [1, 2], "b": [3, 4]})` has four points."""
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def zipped(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """The first values together, the second together, and so on; all of one length."""
    return [dict(zip(values, point, strict=True)) for point in zip(*values.values(), strict=True)]


def net_section(**changes: Any) -> dict[str, Any]:
    """How one net is built and trained, with the given fields changed."""
    fields = {
        "hidden": (800, 800),
        "input_dropout": 0.0,
        "hidden_dropout": 0.0,
        "max_norm": 0.0,  # longest incoming weight vector of a hidden unit; 0: no limit
        "dtype": "float32",  # of the arithmetic; or bfloat16
        # From so many, batch size x classes, the loss is fused with the output layer; 0: never.
        "fused_logits": 2**22,
        "jitter": 0,  # pixels
        "optimizer": "adam",  # or sgd, dropout_2012
        "momentum": 0.9,  # of sgd
        "learning_rate": 1e-3,
        "warmup_epochs": 1,
        "batch_size": 512,
        "micro_batches": 1,
        "epochs": 20,
        "report_every": 1,  # epochs run as one program, between two evaluations
        "save_every": 5,  # reports between two checkpoints
    }
    return {**fields, **changes}
