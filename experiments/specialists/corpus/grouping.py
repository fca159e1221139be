"""Groups typefaces by the similarity of their characters, and holds groups out."""

import hashlib
from collections.abc import Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import squareform

from distill_jax.errors import UserError

_BLUR = 0.8  # pixels, so that small shifts and other weights matter little


def distances(glyphs: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """How differently faces draw the same characters: 1 minus the mean correlation of their pixels.

    Args:
        glyphs: uint8 `[faces, characters, height, width]`.
        drawn: bool `[faces, characters]`; a pair is compared on the characters that both have.

    Returns:
        float32 `[faces, faces]`, symmetric, 0 on the diagonal; 1 for faces that share no character.
    """
    blurred = gaussian_filter(glyphs.astype(np.float32), (0, 0, _BLUR, _BLUR))
    pixels = blurred.reshape(*drawn.shape, -1)
    pixels -= pixels.mean(axis=-1, keepdims=True)
    pixels *= drawn[..., None] / np.maximum(np.linalg.norm(pixels, axis=-1, keepdims=True), 1e-6)
    flat = pixels.reshape(len(glyphs), -1).astype(np.float32)
    shared = drawn.astype(np.float32) @ drawn.astype(np.float32).T
    apart = 1 - flat @ flat.T / np.maximum(shared, 1)
    np.fill_diagonal(apart, 0)
    return np.maximum(apart, 0)


def groups(apart: np.ndarray, threshold: float) -> np.ndarray:
    """Average-linkage groups at a distance: int `[faces]`, numbered in the order of their first face.

    Groups at a smaller threshold lie within those at a larger one.
    """
    if len(apart) == 1:
        return np.zeros(1, int)
    tree = linkage(squareform(apart, checks=False), "average")
    found = fcluster(tree, threshold, "distance")
    _, first, number = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


def hold_out(
    group: Sequence[int], names: Sequence[str], fractions: dict[str, float], rest: str
) -> list[str]:
    """Splits faces by whole groups, in an order by hash.

    Args:
        group: of each face.
        names: of each face; a group's place in the order is by that of its first face.
        fractions: by split, the maximal share of the faces, but at least one face. Splits are filled in
            this order; a group that is too large for the rest of one goes to the next.
        rest: the split that all others go to.

    Returns:
        The split of each face.

    Raises:
        UserError: if a split stays empty.
    """
    members: dict[int, list[str]] = {}
    for number, name in zip(group, names, strict=True):
        members.setdefault(number, []).append(name)
    room = {name: max(1, round(part * len(names))) for name, part in fractions.items()}
    place = {}
    for number in sorted(members, key=lambda number: fraction("group", members[number][0])):
        size = len(members[number])
        place[number] = next((split for split, left in room.items() if size <= left), rest)
        if place[number] != rest:
            room[place[number]] -= size
    splits = [place[number] for number in group]
    for split in (*fractions, rest):
        if split not in splits:
            raise UserError(f"too few kinds of typefaces: {len(members)}, and none for {split}")
    return splits


def fraction(*names: str) -> float:
    """A number in [0, 1) by a hash of the names: the same on every machine."""
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
