"""Knowledge distillation in JAX: pure losses, soft targets, train steps and specialists.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 ("the paper").

A module is imported when it is first named, so that `import distill_jax` costs nothing.

    import distill_jax
    distill_jax.losses.distillation(logits, targets, labels, temperature=4.0, hard_weight=0.1)
"""

from typing import TYPE_CHECKING

from distill_jax import _lazy

if TYPE_CHECKING:
    from distill_jax import (
        batches,
        checkpoints,
        data,
        epochs,
        errors,
        fused_loss,
        later_losses,
        layers,
        loop,
        losses,
        metrics,
        models,
        multi_label,
        nets,
        optimizers,
        processes,
        ranges,
        sharding,
        soft_targets,
        specialists,
        step_losses,
        top_k_losses,
        train_step,
        trainer,
    )
    from distill_jax.nets import load_net

__all__ = [
    "batches",
    "checkpoints",
    "data",
    "epochs",
    "errors",
    "fused_loss",
    "later_losses",
    "layers",
    "load_net",
    "loop",
    "losses",
    "metrics",
    "models",
    "multi_label",
    "nets",
    "optimizers",
    "processes",
    "ranges",
    "sharding",
    "soft_targets",
    "specialists",
    "step_losses",
    "top_k_losses",
    "train_step",
    "trainer",
]

__getattr__, __dir__ = _lazy.attach(__name__, __all__, {"load_net": "nets"})
