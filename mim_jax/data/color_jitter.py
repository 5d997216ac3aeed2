"""Random brightness, contrast, saturation and hue: torchvision's `ColorJitter` on Pillow images."""

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
        hue: largest turn of the hue to either side, in shares of the circle, at most 0.5. A grey
            image has none.
        probability: how often an image is changed at all.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    probability: float = dataclasses.field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 0:
            raise ValueError(f"color_jitter must not be negative, got {dataclasses.astuple(self)}.")
        if self.hue > 0.5:
            raise ValueError(f"the hue of color_jitter must be at most 0.5, got {self.hue}.")
        if self.probability > 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}.")

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
        # No draw where there is nothing to choose: what runs draw does not depend on these fields.
        if self.probability < 1 and rng.random() >= self.probability:
            return image
        strengths = (self.brightness, self.contrast, self.saturation)
        grey = image.shape[2] == 1
        picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if grey else image))
        for i in rng.permutation(len(ENHANCERS) + (self.hue > 0)):
            if i == len(ENHANCERS):
                turn = self.hue * (2 * rng.random() - 1)
                picture = picture if grey else _turned(picture, turn)
                continue
            low = max(0.0, 1 - strengths[i])
            factor = low + (1 + strengths[i] - low) * rng.random()
            if strengths[i] > 0:
                picture = ENHANCERS[i](picture).enhance(factor)
        return np.asarray(picture).reshape(image.shape)


def _turned(picture: Image.Image, turn: float) -> Image.Image:
    """The picture with its hue turned by a share of the circle."""
    hue, saturation, value = picture.convert("HSV").split()
    shift = round(255 * turn)  # as torchvision has it, though there are 256 hues
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
