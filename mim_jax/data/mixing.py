"""Mixing of images and their targets on the device: mixup, cutmix, random erasing, as timm does it.

Zhang et al., 2018 (mixup); Yun et al., 2019 (cutmix); Zhong et al., 2020 (random erasing). All are
pure functions with static shapes. In a step that is compiled for a mesh, "the batch" is the global
one, so the result does not depend on the number of devices; the official code mixes the batch of
each GPU.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mim_jax.losses import smoothed_targets

ERASED_AREA = (0.02, 1 / 3)
"""Smallest and largest share of an image that is erased."""

ERASED_ASPECT = (0.3, 1 / 0.3)
"""Smallest and largest height / width of what is erased."""

ERASING_TRIES = 10
"""Boxes that are drawn until one fits into the image; else it stays whole."""


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Blends every image of a batch with that at the same place in the reverse order.

    A batch is mixed in one way: by mixup or by cutmix, with one share for all its images. In a
    batch of odd size the middle image has itself as its partner.

    Attributes:
        mixup: a of the share's distribution Beta(a, a) in mixup; 0 turns mixup off.
        cutmix: the same of cutmix.
        cutmix_probability: of cutmix where both are on.
        smoothing: share of a single label that goes to all classes in equal parts.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_probability: float = 0.5
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0:
            raise ValueError(
                f"mixup is {self.mixup} and cutmix is {self.cutmix}; neither may be below 0 (off)."
            )
        if not 0 <= self.cutmix_probability <= 1:
            raise ValueError(
                f"cutmix_probability is {self.cutmix_probability}; it must be in [0, 1]."
            )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}; it must be in [0, 1).")

    def __call__(
        self, rng: jax.Array, images: jax.Array, labels: jax.Array, num_classes: int
    ) -> tuple[jax.Array, jax.Array]:
        """Mixed images, and targets to compare logits with.

        Args:
            rng: of the whole batch.
            images: float `[batch, height, width, channels]`, after all other augmentation.
            labels: integers `[batch]`; or 0/1 `[batch, classes]`, of any number of classes for
                each image, which are not smoothed.
            num_classes: length of a target.

        Returns:
            Images like the given ones, and float32 `[batch, classes]`; the targets of single
            labels sum to 1.
        """
        targets = (
            smoothed_targets(labels, num_classes, self.smoothing)
            if labels.ndim == 1
            else labels.astype(jnp.float32)
        )
        if not self.mixup and not self.cutmix:
            return images, targets
        kind_rng, share_rng, box_rng = jax.random.split(rng, 3)
        use_cutmix = jax.random.bernoulli(kind_rng, self._cutmix_share())
        alpha = jnp.where(use_cutmix, self.cutmix, self.mixup)
        share = jax.random.beta(share_rng, alpha, alpha)
        outside = _outside(cutmix_box(box_rng, _size(images), share), _size(images))
        return _blended(images, targets, jnp.where(use_cutmix, outside, share))

    def _cutmix_share(self) -> float:
        """How often a batch is mixed by cutmix."""
        if self.mixup and self.cutmix:
            return self.cutmix_probability
        return 1.0 if self.cutmix else 0.0


def mixup(images: jax.Array, targets: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`share` of every image and target, and `1 - share` of its partner in reverse order.

    Args:
        images: float `[batch, height, width, channels]`.
        targets: float32 `[batch, classes]`.
        share: scalar in [0, 1].
    """
    return _blended(images, targets, jnp.broadcast_to(share, _size(images)))


def cutmix(images: jax.Array, targets: jax.Array, box: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every image with a box of its partner in reverse order; targets by the box's true area.

    Args:
        images: float `[batch, height, width, channels]`.
        targets: float32 `[batch, classes]`.
        box: int32 `[4]`, see `cutmix_box`.
    """
    return _blended(images, targets, _outside(box, _size(images)))


def cutmix_box(rng: jax.Array, size: tuple[int, int], share: jax.Array) -> jax.Array:
    """A box (top, bottom, left, right), int32 `[4]`, end exclusive, cut off at the border.

    Before that it has the share `1 - share` of the image's area and the image's aspect, with
    sides rounded down to an even number of pixels; its centre is uniform over the pixels.

    Args:
        rng: of the batch.
        size: height and width of the images.
        share: of every image that stays, scalar in [0, 1].
    """
    limits = jnp.asarray(size)
    half = jnp.floor(limits * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
    centre = jax.random.randint(rng, (2,), 0, limits)
    low, high = jnp.maximum(centre - half, 0), jnp.minimum(centre + half, limits)
    return jnp.stack([low, high], axis=1).ravel()


def random_erasing(rng: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Replaces a box of some images by Gaussian noise, a draw for each value.

    Box and coin are drawn for each image: area uniform, aspect log-uniform, and the first of
    `ERASING_TRIES` boxes that is smaller than the image on both sides.

    Args:
        rng: of the batch.
        images: normalized float `[batch, height, width, channels]`.
        probability: with which an image is erased, in [0, 1].

    Raises:
        ValueError: for another probability.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"the probability of erasing is {probability}; it must be in [0, 1].")
    if not probability:
        return images
    batch, height, width, _ = images.shape
    coin_rng, area_rng, aspect_rng, top_rng, left_rng, noise_rng = jax.random.split(rng, 6)
    tries = (batch, ERASING_TRIES)
    low, high = ERASED_AREA
    area = jax.random.uniform(area_rng, tries, minval=low, maxval=high) * height * width
    low, high = (math.log(aspect) for aspect in ERASED_ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect_rng, tries, minval=low, maxval=high))
    rows = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)  # [batch, tries]
    columns = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (rows < height) & (columns < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    rows = jnp.take_along_axis(rows, first, axis=1)[:, 0]  # [batch]
    columns = jnp.take_along_axis(columns, first, axis=1)[:, 0]
    top = jax.random.randint(top_rng, (batch,), 0, height - rows + 1)
    left = jax.random.randint(left_rng, (batch,), 0, width - columns + 1)
    box = jnp.stack([top, top + rows, left, left + columns])  # [4, batch]
    erased = jax.random.bernoulli(coin_rng, probability, (batch,)) & jnp.any(fits, axis=1)
    inside = jax.vmap(_inside, in_axes=(1, None))(box, (height, width))
    noise = jax.random.normal(noise_rng, images.shape, images.dtype)
    return jnp.where((inside & erased[:, None, None])[..., None], noise, images)


def _blended(images: jax.Array, targets: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images by their share `keep` `[height, width]` of each pixel, targets by its mean.

    What is kept whole stays as it is to the last bit.
    """
    share = jnp.mean(keep)
    weight = keep[..., None].astype(images.dtype)
    mixed = weight * images + (1 - weight) * images[::-1]
    return mixed, share * targets + (1 - share) * targets[::-1]


def _size(images: jax.Array) -> tuple[int, int]:
    """Height and width of images."""
    return images.shape[1], images.shape[2]


def _outside(box: jax.Array, size: tuple[int, int]) -> jax.Array:
    """1 outside a box and 0 inside, float32 `[height, width]`."""
    return 1 - _inside(box, size).astype(jnp.float32)


def _inside(box: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Whether a pixel lies in a box (top, bottom, left, right): bool `[height, width]`."""
    top, bottom, left, right = box
    rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
