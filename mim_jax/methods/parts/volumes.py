"""What methods for volumes share: planes to look at, and sizes that only they ask for."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

COLOURS = (
    (0.90, 0.25, 0.20),
    (0.20, 0.60, 0.95),
    (0.25, 0.80, 0.35),
    (0.98, 0.80, 0.15),
    (0.70, 0.35, 0.90),
    (0.10, 0.80, 0.80),
    (0.98, 0.55, 0.20),
    (0.95, 0.50, 0.75),
)
"""Of classes 1, 2, ... in [0, 1]; further classes begin again."""


def planes(volumes: jax.Array, centre: jax.Array | None = None) -> dict[str, jax.Array]:
    """Three planes through volumes, as radiologists look at them, but not mirrored.

    Axes are those of the orientation RAS: to the right, to the front, and up.

    Args:
        volumes: `[batch, height, width, depth, channels]`.
        centre: int32 `[batch, 3]`, the voxel that they cross; None takes the middle.

    Returns:
        By name, images `[batch, rows, columns, channels]`; front or head are at the top.
    """
    size = volumes.shape[1:4]
    if centre is None:
        centre = jnp.broadcast_to(jnp.array([side // 2 for side in size]), (len(volumes), 3))

    def cut(axis: int) -> jax.Array:
        ids = centre[:, axis].reshape(-1, *(1,) * 4)
        plane = jnp.take_along_axis(volumes, ids, axis=1 + axis).squeeze(1 + axis)
        return plane.swapaxes(1, 2)[:, ::-1]

    return {"axial": cut(2), "coronal": cut(1), "sagittal": cut(0)}


def fullest_voxel(segmentation: jax.Array) -> jax.Array:
    """Where planes cross most of a segmentation; the middle for an empty one.

    Args:
        segmentation: int `[batch, height, width, depth]`, 0 for background.

    Returns:
        int32 `[batch, 3]`: along each axis, the slice with most voxels of any class but 0.
    """
    inside = (segmentation > 0).astype(jnp.float32)
    found = []
    for axis in (1, 2, 3):
        others = tuple(other for other in (1, 2, 3) if other != axis)
        voxels = inside.sum(axis=others)  # [batch, side]
        side = voxels.shape[1]
        near = -jnp.abs(jnp.arange(side) - side // 2) / side  # less than one voxel
        found.append(jnp.argmax(voxels + near, axis=1))
    return jnp.stack(found, axis=1).astype(jnp.int32)


def overlaid(grey: jax.Array, classes: jax.Array, strength: float = 0.5) -> jax.Array:
    """Images with classes painted over them, `[..., 3]` in [0, 1].

    Args:
        grey: `[..., channels]` in [0, 1], of which the first is shown.
        classes: int `[...]`; 0 is not painted.
        strength: share of the colour.
    """
    palette = jnp.asarray(COLOURS, jnp.float32)
    colour = palette[(classes - 1) % len(COLOURS)]
    painted = (classes > 0)[..., None] * strength
    return jnp.clip(grey[..., :1], 0, 1) * (1 - painted) + colour * painted


def check_taps(taps: Sequence[int], depth: int) -> None:
    """Raises `ValueError` if `model.taps` are no ascending blocks of an encoder."""
    ascending = list(taps) == sorted(set(taps))
    if not ascending or not taps or taps[0] < 0 or taps[-1] >= depth:
        raise ValueError(
            f"model.taps is {tuple(taps)}; give ascending numbers of blocks, from 0 to "
            f"{depth - 1} for an encoder of depth {depth}."
        )


def grid_of(tokens: int, template: tuple[int, ...]) -> tuple[int, ...]:
    """The grid of a position table: the template's if it has as many tokens, else a cube.

    Raises:
        ValueError: if it is neither.
    """
    product = template[0] * template[1] * template[2]
    if product == tokens:
        return template
    side = round(tokens ** (1 / 3))
    if side**3 != tokens:
        raise ValueError(
            f"its {tokens} positions are no cube; set data.image_size and model.patch_size to "
            "those of the file."
        )
    return (side, side, side)
