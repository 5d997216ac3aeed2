"""Random grey, blur, rotation and flip of an image, as TIP's augmentation has them (section 8).

They follow albumentations 1.3, whose functions TIP's own code calls. Colour jitter is in
`mim_jax.data.color_jitter`, the crop in `mim_jax.data.transforms`.
"""

import dataclasses

import numpy as np
from PIL import Image

from mim_jax.data.decode import choose_backend


@dataclasses.dataclass(frozen=True)
class RandomGrey:
    """Takes the colour out of an image, which keeps its three channels.

    Attributes:
        probability: how often.
    """

    probability: float = 0.2

    def __post_init__(self) -> None:
        _check_probability(self.probability)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return `image`, uint8 `[height, width, channels]`, or its luma in every channel.

        Raises:
            ValueError: an image of another type, or of neither 1 nor 3 channels.
        """
        if image.dtype != np.uint8 or image.shape[2] not in (1, 3):
            raise ValueError(
                "random grey works on uint8 images of 1 or 3 channels, got "
                f"{image.dtype} {image.shape}; set its probability to 0 for such images"
            )
        if rng.random() >= self.probability or image.shape[2] == 1:
            return image
        luma = np.asarray(Image.fromarray(np.ascontiguousarray(image)).convert("L"))
        return np.repeat(luma[..., None], 3, axis=-1)


@dataclasses.dataclass(frozen=True)
class RandomBlur:
    """Blurs by a Gaussian of random width; beyond its edges the image is reflected.

    Attributes:
        probability: how often.
        sigma: smallest and largest standard deviation, in pixels.
        kernel: odd number of pixels along the kernel.
    """

    probability: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    kernel: int = 29

    def __post_init__(self) -> None:
        _check_probability(self.probability)
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"sigma must satisfy 0 < low <= high, got {self.sigma}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {self.kernel}")
        choose_backend("opencv")  # says what is missing where it is not installed

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return `image`, uint8 or uint16 `[height, width, channels]`, perhaps blurred."""
        import cv2

        if rng.random() >= self.probability:
            return image
        sigma = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * rng.random()
        blurred = cv2.GaussianBlur(np.ascontiguousarray(image), (self.kernel, self.kernel), sigma)
        return blurred.reshape(image.shape)  # OpenCV drops a channel axis of length 1


@dataclasses.dataclass(frozen=True)
class RandomRotation:
    """Turns around the middle by a random angle; what comes in from outside is reflected.

    Attributes:
        degrees: largest angle to either side.
        probability: how often.
    """

    degrees: float = 45.0
    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_probability(self.probability)
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"degrees must be in [0, 180], got {self.degrees}")
        choose_backend("opencv")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return `image`, uint8 or uint16 `[height, width, channels]`, perhaps turned."""
        import cv2

        if rng.random() >= self.probability:
            return image
        height, width = image.shape[:2]
        angle = self.degrees * (2 * rng.random() - 1)
        matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
        turned = cv2.warpAffine(
            np.ascontiguousarray(image),
            matrix,
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        return turned.reshape(image.shape)


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Mirrors left and right.

    Images whose augmentation is all or nothing flip here; others on the device.

    Attributes:
        probability: how often.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_probability(self.probability)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return `image`, `[height, width, channels]` of any type, perhaps mirrored."""
        return image[:, ::-1] if rng.random() < self.probability else image


def _check_probability(probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
