"""Ensembles of a generalist and specialists: sections 5 and 6.1 of the paper."""

from typing import TYPE_CHECKING

from distill_jax import _lazy

if TYPE_CHECKING:
    from distill_jax.specialists import (
        clustering,
        coverage,
        enrichment,
        eq5,
        greedy,
        heads,
        inference,
        store,
    )

__all__ = ["clustering", "coverage", "enrichment", "eq5", "greedy", "heads", "inference", "store"]

__getattr__, __dir__ = _lazy.attach(__name__, __all__)
