"""A training crop that keeps the middle of the image: timm's `rkrc` (Locality Alignment)."""

import dataclasses
import math

import numpy as np

from mim_jax.data.resize import resized
from mim_jax.data.transforms import RandomResizedCrop, Size, without_far_ends

ZOOM_PROBABILITY = 0.5
ASPECT_PROBABILITY = 0.5
"""How often each of the two is changed."""

INTERPOLATIONS = ("bilinear", "bicubic")
"""One of them is drawn for every image."""


@dataclasses.dataclass(frozen=True)
class KeepRatioCrop:
    """Resizes so that the short side just fits, with some zoom and stretch, and cuts the centre.

    timm's `ResizeKeepRatio` and `CenterCropOrPad`: a zoom that leaves a share of the area, and an
    aspect that stretches one side as much as it shrinks the other, each in half of the images.
    Where a side comes out smaller than the crop, it is continued by reflection.

    Attributes:
        size: height and width of the result in pixels.
        area: smallest and largest share of the area, each in (0, 1].
        aspect: smallest and largest factor on width / height.
        backend: `opencv`, `pillow` or `auto`.
    """

    size: Size
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    backend: str = "auto"

    def __post_init__(self) -> None:
        RandomResizedCrop(self.size, self.area, self.aspect, backend=self.backend)  # checks them

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a random crop of `image`.

        Args:
            image: uint8 or uint16 `[height, width, channels]`.
            rng: gives all the randomness of this crop.

        Returns:
            `[size[0], size[1], channels]` of the same type.
        """
        image = without_far_ends(image, self.size)
        size = self.resized_size(image.shape[0], image.shape[1], rng)
        kernel = INTERPOLATIONS[int(rng.random() * len(INTERPOLATIONS))]
        return centre(resized(image, size, kernel, self.backend), self.size)

    def resized_size(self, height: int, width: int, rng: np.random.Generator) -> Size:
        """Return the size to which a `height` x `width` image is resized before the cut."""
        ratio = min(height / self.size[0], width / self.size[1])
        zoom = stretch = 1.0
        if rng.random() < ZOOM_PROBABILITY:
            low, high = self.area
            zoom = 1 / math.sqrt(low + (high - low) * rng.random())
        if rng.random() < ASPECT_PROBABILITY:
            low, high = map(math.log, self.aspect)
            stretch = math.exp((low + (high - low) * rng.random()) / 2)
        rows, columns = height * zoom / stretch / ratio, width * zoom * stretch / ratio
        return max(1, round(rows)), max(1, round(columns))


def centre(image: np.ndarray, size: Size) -> np.ndarray:
    """Return the centre of `image`, continued by reflection where it is smaller than `size`."""
    missing = [max(0, wanted - given) for wanted, given in zip(size, image.shape)]
    if any(missing):
        # The odd pixel goes to the bottom and to the right.
        margins = [(lack // 2, (lack + 1) // 2) for lack in missing]
        image = np.pad(image, (*margins, (0, 0)), mode="reflect")
    # Python's round halves to even, as timm's does.
    top, left = (round((given - wanted) / 2) for wanted, given in zip(size, image.shape))
    return image[top : top + size[0], left : left + size[1]]
