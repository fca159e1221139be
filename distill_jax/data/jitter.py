"""Translation of images on the device, inside the step."""

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax.errors import UserError
from distill_jax.training import Batch, Transform


def jitter(pixels: int) -> Transform:
    """Moves each image by up to `pixels` in any direction, filling with zeros (section 3).

    Raises:
        UserError: at trace time, if the batch carries cached soft targets. They belong to the images
            as they were; put `online_teacher` after the jitter instead.
    """

    def move(batch: Batch, key: Array) -> Batch:
        if {"teacher_logits", "teacher_ids"} & set(batch):
            raise UserError(
                "cached soft targets can't be joined to jittered images: set jitter to 0, or compute "
                "them in the step (training.online_teacher after the jitter)"
            )
        images = batch["image"]
        margins = [(0, 0), (pixels, pixels), (pixels, pixels)] + [(0, 0)] * (images.ndim - 3)
        corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pixels + 1)

        # dynamic_slice of padded uint8 was the fastest of eleven ways on a CPU, by 10x over a roll.
        def crop(padded: Array, corner: Array) -> Array:
            start = [corner[0], corner[1]] + [jnp.int32(0)] * (padded.ndim - 2)
            return jax.lax.dynamic_slice(padded, start, images.shape[1:])

        return {**batch, "image": jax.vmap(crop)(jnp.pad(images, margins), corners)}

    return move
