"""Crops of one image on the host: random for training, centred for evaluation.

Both are small frozen dataclasses, so they can be sent to worker processes and compared. Flipping
and normalization are not here: they are done on the device, inside the train step.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from mim_jax.data.decode import choose_backend
from mim_jax.data.resize import INTERPOLATIONS, resized, resized_to_nearest

Size = tuple[int, int]
Box = tuple[int, int, int, int]  # top, left, height, width

# Of an image that is relatively longer than this many crops in a row, the ends are left out.
_LONGEST = 16


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """Cut a random box and resize it: the training crop of torchvision and of MAE.

    Draw an area and a log-uniform aspect until the box fits, at most `tries` times, then fall
    back to a centred box with the aspect clipped (torchvision's `RandomResizedCrop.get_params`).
    With `single_draw`, draw once and clip height and width to the image (the linear-probe crop of
    MAE, `util/crop.py`).

    Attributes:
        size: height and width of the result in pixels.
        area: smallest and largest share of the image's area, each in (0, 1].
        aspect: smallest and largest width / height.
        interpolation: `bicubic`, `bilinear` or `lanczos`.
        backend: `opencv`, `pillow` or `auto` (OpenCV if installed). `pillow` gives the pixels
            that torchvision gives for a PIL image; see `mim_jax.data.resize` for the difference.
        tries: draws before the fallback.
        single_draw: draw once and clip, never fall back.
    """

    size: Size
    area: tuple[float, float] = (0.2, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bicubic"
    backend: str = "auto"
    tries: int = 10
    single_draw: bool = False

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_resize_options(self.interpolation, self.backend)
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area must satisfy 0 < low <= high <= 1, got {self.area}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect must satisfy 0 < low <= high, got {self.aspect}")
        if self.tries < 1:
            raise ValueError(f"tries must be at least 1, got {self.tries}")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a random crop of `image`.

        Args:
            image: uint8 or uint16 `[height, width, channels]`.
            rng: gives all the randomness of this crop.

        Returns:
            `[size[0], size[1], channels]` of the same type.
        """
        return resized(self.cut(image, rng), self.size, self.interpolation, self.backend)

    def cut(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a random box of `image`, not resized."""
        top, left, height, width = self.box(image.shape[0], image.shape[1], rng)
        return image[top : top + height, left : left + width]

    def box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """Return the box (top, left, height, width) to cut from a `height` x `width` image."""
        low, high = self.area[0] * height * width, self.area[1] * height * width
        log_low, log_high = math.log(self.aspect[0]), math.log(self.aspect[1])
        for _ in range(1 if self.single_draw else self.tries):
            area = low + (high - low) * rng.random()
            aspect = math.exp(log_low + (log_high - log_low) * rng.random())
            box_width = round(math.sqrt(area * aspect))
            box_height = round(math.sqrt(area / aspect))
            if self.single_draw:
                box_width = min(max(box_width, 1), width)
                box_height = min(max(box_height, 1), height)
            if 0 < box_width <= width and 0 < box_height <= height:
                # floor(u * n) is uniform over range(n) and far cheaper than rng.integers.
                top = int(rng.random() * (height - box_height + 1))
                left = int(rng.random() * (width - box_width + 1))
                return top, left, box_height, box_width
        return self._centred_box(height, width)

    def _centred_box(self, height: int, width: int) -> Box:
        """Return the largest centred box whose aspect is allowed."""
        narrowest, widest = self.aspect
        box_height, box_width = height, width
        if width / height < narrowest:
            box_height = round(width / narrowest)
        elif width / height > widest:
            box_width = round(height * widest)
        return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@dataclasses.dataclass(frozen=True)
class CropWithTarget:
    """A random crop that is rendered twice: for the model, and for a network that makes targets.

    Both show the same box of the image; nothing is drawn beyond what `crop` draws (the two
    pictures of BEiT and CAE, `RandomResizedCropAndInterpolationWithTwoPic`).

    Attributes:
        crop: chooses the box and renders the first.
        target_size: height and width of the second in pixels.
        target_interpolation: `bicubic`, `bilinear` or `lanczos`.
    """

    crop: RandomResizedCrop
    target_size: Size
    target_interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        _check_size(self.target_size)
        _check_resize_options(self.target_interpolation, self.crop.backend)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return `image` and `target_image`, see `RandomResizedCrop`."""
        crop, cut = self.crop, self.crop.cut(image, rng)
        return {
            "image": resized(cut, crop.size, crop.interpolation, crop.backend),
            "target_image": resized(cut, self.target_size, self.target_interpolation, crop.backend),
        }


@dataclasses.dataclass(frozen=True)
class EvaluationCrop:
    """Resize so that the image covers `size / crop_ratio`, then cut the centre.

    For a square size this is the usual evaluation transform: short side to `size / crop_ratio`
    (224 -> 256), bicubic, centre crop. For any other size the image is scaled, keeping its
    aspect, by the smallest factor at which it covers both `size[0] / crop_ratio` rows and
    `size[1] / crop_ratio` columns.

    The default ratio is 0.875 for sizes up to 224 and 1.0 above (MAE, `util/datasets.py`); it
    goes by the larger side. That holds for small sizes too: 28 x 28 images are enlarged to
    32 x 32 and lose a border of 2 pixels. Where the object fills the frame, as in Fashion-MNIST,
    use `crop_ratio=1.0`: an image that already has the size then passes unchanged.

    Attributes:
        size: height and width of the result in pixels.
        crop_ratio: share of the resized image that is kept, in (0, 1]; None for the default.
        interpolation: `bicubic`, `bilinear` or `lanczos`.
        backend: `opencv`, `pillow` or `auto`; `pillow` gives torchvision's pixels.
    """

    size: Size
    crop_ratio: float | None = None
    interpolation: str = "bicubic"
    backend: str = "auto"

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_resize_options(self.interpolation, self.backend)
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise ValueError(f"crop_ratio must be in (0, 1], got {self.crop_ratio}")

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Return the centre of `image`.

        Args:
            image: uint8 or uint16 `[height, width, channels]`.
            rng: not used; accepted so that training can use this crop too.

        Returns:
            `[size[0], size[1], channels]` of the same type.
        """
        del rng
        return self._centre(
            image, lambda whole, size: resized(whole, size, self.interpolation, self.backend)
        )

    def of_classes(self, classes: np.ndarray) -> np.ndarray:
        """Return the centre of a map as large as an image: of its pixels, what `__call__` shows.

        Args:
            classes: of any type, `[height, width]`.

        Returns:
            `[size[0], size[1]]` of the same type; where the image is interpolated, the map has
            the value of the nearest pixel.
        """
        return self._centre(classes, resized_to_nearest)

    def _centre(
        self, image: np.ndarray, resize: Callable[[np.ndarray, Size], np.ndarray]
    ) -> np.ndarray:
        image = without_far_ends(image, self.size)
        whole = self.resized_size(image.shape[0], image.shape[1])
        # Python's round halves to even, as torchvision's center_crop does.
        top = round((whole[0] - self.size[0]) / 2)
        left = round((whole[1] - self.size[1]) / 2)
        image = resize(image, whole)
        return image[top : top + self.size[0], left : left + self.size[1]]

    def resized_size(self, height: int, width: int) -> Size:
        """Return the size to which a `height` x `width` image is resized before the cut."""
        ratio = self.crop_ratio
        if ratio is None:
            ratio = 0.875 if max(self.size) <= 224 else 1.0
        rows, columns = int(self.size[0] / ratio), int(self.size[1] / ratio)
        if rows * width >= columns * height:  # the rows need the larger factor
            return rows, rows * width // height
        return columns * height // width, columns


def without_far_ends(image: np.ndarray, size: Size) -> np.ndarray:
    """Return the middle of an image that is very much longer than the crop.

    Only its middle is in the crop, but all of it would be resized: 1 x 4,000 pixels to 256 x
    1,024,000 for a crop of 224 x 224.
    """
    height, width = image.shape[:2]
    rows = max(1, _LONGEST * width * size[0] // size[1])
    columns = max(1, _LONGEST * height * size[1] // size[0])
    top, left = max(0, height - rows) // 2, max(0, width - columns) // 2
    return image[top : top + rows, left : left + columns]


def _check_size(size: Size) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (height, width) in whole pixels, got {size!r}")


def _check_resize_options(interpolation: str, backend: str) -> None:
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"unknown interpolation {interpolation!r}; use one of {', '.join(INTERPOLATIONS)}"
        )
    choose_backend(backend)
