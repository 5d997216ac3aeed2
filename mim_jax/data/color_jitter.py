"""Random brightness, contrast and saturation: torchvision's `ColorJitter` on Pillow images."""

import dataclasses

import numpy as np
from PIL import Image, ImageEnhance

ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
"""What torchvision calls for brightness, contrast and saturation of a Pillow image."""


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Changes each property by a factor uniform in [max(0, 1 - v), 1 + v], in random order.

    Attributes:
        brightness: v of the brightness; 0 leaves it alone.
        contrast: v of the contrast.
        saturation: v of the saturation, which a grey image does not have.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        if min(self.brightness, self.contrast, self.saturation) < 0:
            raise ValueError(f"color_jitter must not be negative, got {dataclasses.astuple(self)}.")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a changed image.

        Args:
            image: uint8 `[height, width, channels]` of 1 or 3 channels.
            rng: gives all the randomness.

        Returns:
            uint8 of the same shape.

        Raises:
            ValueError: an image of another type or number of channels.
        """
        if image.dtype != np.uint8 or image.shape[2] not in (1, 3):
            raise ValueError(
                "color_jitter works on uint8 images of 1 or 3 channels, got "
                f"{image.dtype} {image.shape}; set data.color_jitter to (0, 0, 0) for such images."
            )
        strengths = dataclasses.astuple(self)
        grey = image.shape[2] == 1
        picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if grey else image))
        for i in rng.permutation(len(ENHANCERS)):
            low = max(0.0, 1 - strengths[i])
            factor = low + (1 + strengths[i] - low) * rng.random()
            if strengths[i] > 0:
                picture = ENHANCERS[i](picture).enhance(factor)
        return np.asarray(picture).reshape(image.shape)
