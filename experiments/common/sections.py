"""The part of a config that describes one net; `experiments.common.members` builds and trains it."""

from typing import Any


def net(**changes: Any) -> dict[str, Any]:
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
