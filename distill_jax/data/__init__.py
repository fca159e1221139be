"""Image sets, transfer sets, streams from disk and augmentation; each is imported when first named."""

from typing import TYPE_CHECKING

from distill_jax import _lazy

if TYPE_CHECKING:
    from distill_jax.data import augment, distortion, images, records, stream, transfer

__all__ = ["augment", "distortion", "images", "records", "stream", "transfer"]

__getattr__, __dir__ = _lazy.attach(__name__, __all__)
