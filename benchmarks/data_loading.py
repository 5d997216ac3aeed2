"""How many images a second does one core load? Ours, and a loader written the PyTorch way.

    python -m benchmarks.data_loading

The process keeps to one core. Images are JPEGs of two kinds, made from a seed: "web" (500 x 375, as
ImageNet's) and "camera" (2000 x 1500). Two things are measured, each with all contestants in turns:

 - loaders: from files to a batch that is ready for the device. The PyTorch way is a data set that
   decodes with Pillow, RandomResizedCrop (bicubic), flip, float32, normalize, and a collate
   function; where torch is installed, inside its DataLoader. Ours gives uint8 and leaves flip
   and normalization to the device.
 - decoders: one image from bytes to a cropped uint8 one, to see what else could help: decoding at
   a lower scale where the crop stays at least as large as the result, another library, files
   that were made smaller beforehand.
"""

import argparse
import functools
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from benchmarks import measure
from mim_jax.data import RandomResizedCrop, open_source, train_batches
from mim_jax.data.resize import resized
from mim_jax.data.transforms import Box

KINDS = {"web": (375, 500), "camera": (1500, 2000)}
"""Height and width in pixels."""

SPECTRUM, SENSOR_NOISE = 1.2, 8.0
"""Fall of the amplitude with frequency, and deviation of each pixel; chosen so that files of
ImageNet's size have about ImageNet's 110 kB."""

SHORT_SIDE = 256
"""Of the files that were made smaller beforehand."""

MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)

Loader = Callable[[], Iterator[Any]]
Decoder = Callable[[bytes, np.random.Generator], np.ndarray]


def photograph(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Noise of which most is at low frequencies, as in photographs, and sensor noise; uint8 RGB."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = np.maximum(np.hypot(rows, columns), 1 / max(height, width)) ** -SPECTRUM
    planes = []
    for _ in range(3):
        spectrum = np.fft.rfft2(random.normal(size=(height, width))) * amplitude
        plane = np.fft.irfft2(spectrum, (height, width))
        planes.append(plane / plane.std())
    grey = planes[0]
    colours = np.stack([grey + 0.3 * planes[1], grey, grey + 0.3 * planes[2]], axis=-1)
    noise = random.normal(scale=SENSOR_NOISE, size=colours.shape)
    return np.clip(128 + 50 * colours + noise, 0, 255).astype(np.uint8)


def write_images(folder: Path, kind: str, count: int) -> None:
    """Writes JPEGs of quality 90 of one kind, and below `small` the same made smaller."""
    height, width = KINDS[kind]
    shrink = SHORT_SIDE / min(height, width)
    for name in ("full", "small"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        image = Image.fromarray(photograph(height, width, np.random.default_rng(i)))
        image.save(folder / "full" / f"{i:05}.jpg", quality=90)
        small = image.resize(
            (round(width * shrink), round(height * shrink)), Image.Resampling.BICUBIC
        )
        small.save(folder / "small" / f"{i:05}.jpg", quality=90)


class PillowDataset:
    """What a PyTorch training script would write, with Pillow and NumPy alone."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths = sorted(folder.glob("*.jpg"))
        self.crop = RandomResizedCrop((size, size), backend="pillow")
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """One image, float32 `[channels, height, width]`, normalized."""
        with Image.open(self.paths[index]) as opened:
            image = opened.convert("RGB")
        # torchvision resizes a Pillow image, so the pixels are never turned into an array before.
        top, left, height, width = self.crop.box(image.height, image.width, self.random)
        box = (left, top, left + width, top + height)
        image = image.crop(box).resize(self.crop.size[::-1], Image.Resampling.BICUBIC)
        if self.random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        array = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255
        return (array - MEAN[:, None, None]) / STD[:, None, None]


def pytorch_way(folder: Path, size: int, batch_size: int) -> Loader:
    """Batches of `PillowDataset`, by torch's DataLoader in this process if it is installed."""
    dataset = PillowDataset(folder, size)
    if importlib.util.find_spec("torch"):
        import torch
        from torch.utils.data import DataLoader

        torch.set_num_threads(1)
        # A data set by its methods; DataLoader asks for no base class.
        batches: Any = DataLoader(dataset, batch_size, shuffle=True, drop_last=True)  # type: ignore[arg-type, unused-ignore]
        return lambda: iter(batches)

    def load() -> Iterator[np.ndarray]:
        order = np.random.default_rng(0).permutation(len(dataset))
        for start in range(0, len(dataset) - batch_size + 1, batch_size):
            yield np.stack([dataset[int(i)] for i in order[start : start + batch_size]])

    return load


def ours(folder: Path, size: int, batch_size: int, backend: str) -> Loader:
    """Batches of our pipeline, in one thread."""
    source = open_source(f"folder:{folder}", backend=backend)
    crop = RandomResizedCrop((size, size), backend=backend)
    steps = len(source) // batch_size
    return lambda: train_batches(
        source, crop, batch_size=batch_size, seed=0, num_steps=steps, threads=1
    )


def ours_float32(folder: Path, size: int, batch_size: int) -> Loader:
    """Our pipeline with flip and normalization on the host, as float32."""
    batches, random = ours(folder, size, batch_size, "opencv"), np.random.default_rng(0)

    def load() -> Iterator[np.ndarray]:
        for batch in batches():
            images = batch["image"]
            flipped = random.random((len(images), 1, 1, 1)) < 0.5
            images = np.where(flipped, images[:, :, ::-1], images)
            yield (images.astype(np.float32) / 255 - MEAN) / STD

    return load


def by_opencv(crop: RandomResizedCrop, data: bytes, random: np.random.Generator) -> np.ndarray:
    """Decoded as a whole, then cropped."""
    image = _opencv_pixels(data, cv2.IMREAD_COLOR)
    return _cut(image, crop.box(image.shape[0], image.shape[1], random), crop)


def by_scaled_opencv(
    crop: RandomResizedCrop, data: bytes, random: np.random.Generator
) -> np.ndarray:
    """Decoded at 1/2, 1/4 or 1/8 where the crop stays at least as large as the result."""
    height, width = image_size(data)
    box = crop.box(height, width, random)
    factor = _factor(box, crop.size)
    flag = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }[factor]
    return _cut(_opencv_pixels(data, flag), _scaled(box, 1 / factor), crop)


def by_pillow_draft(
    crop: RandomResizedCrop, data: bytes, random: np.random.Generator
) -> np.ndarray:
    """The same with Pillow, which reads the size from the same header."""
    with Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
        box = crop.box(height, width, random)
        factor = _factor(box, crop.size)
        if factor > 1:
            opened.draft("RGB", (width // factor, height // factor))
        image = np.asarray(opened.convert("RGB"))
    return _cut(image, _scaled(box, image.shape[1] / width), crop)


def by_simplejpeg(
    crop: RandomResizedCrop, data: bytes, random: np.random.Generator, *, scaled: bool
) -> np.ndarray:
    """libjpeg-turbo by the package simplejpeg, which can scale by any number of eighths."""
    import simplejpeg

    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    box = crop.box(height, width, random)
    least = {}
    if scaled:
        share = max(crop.size[0] / box[2], crop.size[1] / box[3], 1 / 8)
        if share < 1:
            least = dict(min_height=int(height * share), min_width=int(width * share))
    image = simplejpeg.decode_jpeg(data, "RGB", min_factor=1, **least)
    return _cut(image, _scaled(box, image.shape[1] / width), crop)


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width from the header alone."""
    with Image.open(io.BytesIO(data)) as opened:
        return opened.height, opened.width


def _opencv_pixels(data: bytes, flag: int) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    assert image is not None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _factor(box: Box, size: tuple[int, int]) -> int:
    """The largest of 1, 2, 4 and 8 by which a box may shrink and still cover `size`."""
    return next(
        f for f in (8, 4, 2, 1) if f == 1 or (box[2] >= f * size[0] and box[3] >= f * size[1])
    )


def _scaled(box: Box, share: float) -> Box:
    """A box in the pixels of a smaller image."""
    top, left, height, width = box
    return int(top * share), int(left * share), round(height * share), round(width * share)


def _cut(image: np.ndarray, box: Box, crop: RandomResizedCrop) -> np.ndarray:
    top, left, height, width = box
    cut = image[top : top + height, left : left + width]
    return resized(cut, crop.size, crop.interpolation, crop.backend)


def decoders(size: int) -> dict[str, Decoder]:
    """Ways to get a cropped image from the bytes of a file."""
    crop = RandomResizedCrop((size, size), backend="opencv")
    found: dict[str, Decoder] = {
        "OpenCV": functools.partial(by_opencv, crop),
        "OpenCV, scaled": functools.partial(by_scaled_opencv, crop),
        "Pillow, scaled": functools.partial(by_pillow_draft, crop),
    }
    if importlib.util.find_spec("simplejpeg"):
        found["simplejpeg"] = functools.partial(by_simplejpeg, crop, scaled=False)
        found["simplejpeg, scaled"] = functools.partial(by_simplejpeg, crop, scaled=True)
    return found


def difference_by_scaling(files: Sequence[bytes], size: int) -> float:
    """Mean absolute difference, of 255, between full and scaled decoding of the same crops."""
    crop = RandomResizedCrop((size, size), backend="opencv")
    differences = []
    for i, data in enumerate(files):
        pair = [way(crop, data, np.random.default_rng(i)) for way in (by_opencv, by_scaled_opencv)]
        differences.append(np.abs(pair[0].astype(np.float32) - pair[1]).mean())
    return float(np.mean(differences))


def measure_kind(folder: Path, size: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Images a second of all loaders and decoders on one kind of files."""
    full, small = folder / "full", folder / "small"
    files = [path.read_bytes() for path in sorted(full.glob("*.jpg"))]
    small_files = [path.read_bytes() for path in sorted(small.glob("*.jpg"))]
    loaders = {
        "PyTorch way": pytorch_way(full, size, batch_size),
        "ours": ours(full, size, batch_size, "opencv"),
        "ours, Pillow": ours(full, size, batch_size, "pillow"),
        "ours, float32 on the host": ours_float32(full, size, batch_size),
        f"ours, files of {SHORT_SIDE} pixels": ours(small, size, batch_size, "opencv"),
        f"PyTorch way, files of {SHORT_SIDE} pixels": pytorch_way(small, size, batch_size),
    }
    seconds = measure.alternate(
        {name: functools.partial(_read_all, load) for name, load in loaders.items()}, rounds
    )
    images = len(files) // batch_size * batch_size
    loading = _rates(seconds, images, reference="PyTorch way")
    ways = {
        name: functools.partial(_decode_all, way, files) for name, way in decoders(size).items()
    }
    ways[f"OpenCV, files of {SHORT_SIDE} pixels"] = functools.partial(
        _decode_all, decoders(size)["OpenCV"], small_files
    )
    return {
        "kilobytes_per_file": sum(map(len, files)) / len(files) / 1000,
        "loaders": loading,
        "decoders": _rates(measure.alternate(ways, rounds), len(files), reference="OpenCV"),
        "mean_difference_by_scaling": difference_by_scaling(files, size),
    }


def _read_all(load: Loader) -> None:
    for _ in load():
        pass


def _decode_all(way: Decoder, files: Sequence[bytes]) -> None:
    random = np.random.default_rng(0)  # the same crops for all
    for data in files:
        way(data, random)


def _rates(seconds: dict[str, list[float]], images: int, reference: str) -> dict[str, Any]:
    """Images a second of each contestant, and how many times as fast as the reference it is."""
    timing = {name: measure.summary(values) for name, values in seconds.items()}
    return {
        name: {
            "images_per_second": images / entry["median"],
            f"speed over {reference}": timing[reference]["median"] / entry["median"],
            "seconds": entry,
        }
        for name, entry in timing.items()
    }


def keep_to_one_core() -> None:
    """Keeps this process and its threads to one core, and OpenCV to one thread."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures both kinds of files and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help="Files of the kind web.")
    parser.add_argument("--camera-images", type=int, default=32, help="Files of the kind camera.")
    parser.add_argument("--size", type=int, default=224, help="Side of the crop in pixels.")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="How often each is timed.")
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "data_loading.json")
    options = parser.parse_args(arguments)
    counts = {"web": options.images, "camera": options.camera_images}
    if min(counts.values()) < options.batch_size:
        parser.error(f"--batch-size {options.batch_size} needs as many files of each kind")
    keep_to_one_core()
    report = measure.Report("data_loading", arguments)
    figures: dict[str, Any] = {"size": options.size, "batch_size": options.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        for kind, count in counts.items():
            write_images(Path(folder) / kind, kind, count)
            figures[kind] = {
                "files": count,
                "pixels": KINDS[kind],
                **measure_kind(
                    Path(folder) / kind, options.size, options.batch_size, options.rounds
                ),
            }
    return report.write(options.output, figures)


if __name__ == "__main__":
    main()
