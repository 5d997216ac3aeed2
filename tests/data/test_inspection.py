import pathlib
import time

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mim_jax.data import open_source
from mim_jax.data.contact_sheet import contact_sheet
from mim_jax.data.inspection import facts_table, inspect_source, source_sheet
from mim_jax.data.sources import ArraySource
from tests.data.images import smooth_image


def save(folder: pathlib.Path, name: str, image: np.ndarray) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def shown(facts: object) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(facts_table(facts))  # type: ignore[arg-type]
    return capture.get()


def test_facts_of_a_folder(tmp_path: pathlib.Path) -> None:
    for number in range(5):
        save(tmp_path, f"{'ab'[number > 1]}/{number}.png", smooth_image(20 + number, 40 - number))
    save(tmp_path, "b/9.png", smooth_image()[..., 0])
    source = open_source(f"folder:{tmp_path}")
    facts = inspect_source(source)
    assert (facts.name, facts.count, facts.sampled) == (source.name, 6, 6)
    assert (facts.num_classes, facts.class_names) == (2, ("a", "b"))
    assert (facts.class_counts, facts.counted, facts.multi_label) == ((2, 4), 6, False)
    assert (facts.heights, facts.widths) == ((20, 22, 40), (36, 38, 60))
    assert (facts.channels, facts.channel_counts, facts.bits) == (3, {1: 1, 3: 5}, 8)
    assert facts.unreadable == ()
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.png")]
    assert facts.bytes_per_image == round(sum(sizes) / 6)


def test_mean_and_deviation_count_every_image_the_same() -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[0, ..., 0] = 255
    images[:, :2, :, 1] = 255
    facts = inspect_source(ArraySource("x", images))
    np.testing.assert_allclose(facts.mean, [0.5, 0.5, 0])
    np.testing.assert_allclose(facts.std, [0.5, 0.5, 0])


def test_mean_and_deviation_are_those_of_the_pixels(tmp_path: pathlib.Path) -> None:
    images = [smooth_image(seed=seed) for seed in range(4)]
    for number, image in enumerate(images):
        save(tmp_path, f"{number}.png", image)
    facts = inspect_source(open_source(f"folder:{tmp_path}"))
    np.testing.assert_allclose(facts.mean, np.mean(images, axis=(0, 1, 2)) / 255, rtol=1e-9)
    np.testing.assert_allclose(facts.std, np.std(images, axis=(0, 1, 2)) / 255, rtol=1e-9)


def test_sixteen_bits_are_found_and_kept(tmp_path: pathlib.Path) -> None:
    save(tmp_path, "a.png", np.full((4, 4), 12_345, np.uint16))
    save(tmp_path, "b.png", np.full((4, 4), 255, np.uint8))
    facts = inspect_source(open_source(f"folder:{tmp_path}"))
    assert (facts.channels, facts.bits) == (1, 16)
    np.testing.assert_allclose(facts.mean, [(12_345 / 65_535 + 1) / 2])


def test_channels_do_not_depend_on_how_the_source_was_opened(tmp_path: pathlib.Path) -> None:
    for number in range(3):
        save(tmp_path, f"{number}.png", smooth_image(seed=number)[..., 0])
    facts = [
        inspect_source(open_source(f"folder:{tmp_path}", channels=channels)) for channels in (1, 3)
    ]
    assert facts[0] == facts[1]
    assert facts[0].channels == 1


def test_channels_may_be_chosen(tmp_path: pathlib.Path) -> None:
    save(tmp_path, "a.png", smooth_image())
    facts = inspect_source(open_source(f"folder:{tmp_path}"), channels=1)
    assert len(facts.mean) == facts.channels == 1
    assert facts.channel_counts == {3: 1}


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("LA", 1), ("P", 3), ("CMYK", 3)])
def test_alpha_does_not_count(tmp_path: pathlib.Path, mode: str, channels: int) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.fromarray(smooth_image()).convert(mode).save(tmp_path / f"a.{suffix}")
    facts = inspect_source(open_source(f"folder:{tmp_path}"))
    assert facts.channels == len(facts.mean) == channels


@pytest.mark.parametrize("channels", [2, 4, 7])
def test_bands_are_counted_as_they_are(tmp_path: pathlib.Path, channels: int) -> None:
    np.save(tmp_path / "a.npy", np.arange(channels, dtype=np.uint8) * np.ones((5, 6, 1), np.uint8))
    source = open_source(f"folder:{tmp_path}", channels=channels)
    facts = inspect_source(source)
    assert facts.channels == channels
    np.testing.assert_allclose(facts.mean, np.arange(channels) / 255)
    assert source_sheet(source).shape[2] == 3


def test_unreadable_files_are_named(tmp_path: pathlib.Path) -> None:
    for number in range(3):
        save(tmp_path, f"{number}.png", smooth_image())
    (tmp_path / "empty.jpg").touch()
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    facts = inspect_source(open_source(f"folder:{tmp_path}"))
    assert sorted(message.split(":")[0] for message in facts.unreadable) == ["2.png", "empty.jpg"]
    assert (facts.count, facts.sampled) == (4, 2)
    assert "empty.jpg: the file is empty" in shown(facts)


def test_labels_that_only_records_know_are_counted_in_the_sample() -> None:
    class Labelled(ArraySource):
        """Without the array of its labels."""

        def __getitem__(self, index: int) -> dict[str, object]:
            return {**super().__getitem__(index), "label": index % 2}

    source = Labelled("x", np.zeros((10, 2, 2, 1), np.uint8))
    source.num_classes = 2
    facts = inspect_source(source, 4)
    assert facts.counted == sum(facts.class_counts or ()) == 4
    assert "2, counted in 4 examples" in shown(facts)


def test_vectors_of_labels_are_counted(tmp_path: pathlib.Path) -> None:
    for name in "abc":
        save(tmp_path, f"{name}.png", smooth_image())
    (tmp_path / "labels.csv").write_text("file,label\na.png,x;y\nb.png,y\nc.png,\n")
    facts = inspect_source(open_source(f"folder:{tmp_path}"))
    assert facts.multi_label and facts.class_counts == (1, 2)
    assert "classes, several an example" in shown(facts)


def test_the_sample_is_the_same_in_every_run_and_spread() -> None:
    source = open_source("embedded", "test")
    first, again = inspect_source(source, 100), inspect_source(source, 100)
    assert first == again
    whole = inspect_source(source, None)
    assert (first.sampled, whole.sampled) == (100, 1000)
    assert first.mean != whole.mean
    np.testing.assert_allclose(first.mean, whole.mean, atol=0.05)


def test_a_folder_of_512_small_files_takes_less_than_three_seconds(tmp_path: pathlib.Path) -> None:
    for number in range(512):
        Image.fromarray(smooth_image(64, 64, seed=number)).save(tmp_path / f"{number}.jpg")
    source = open_source(f"folder:{tmp_path}")
    start = time.perf_counter()
    inspect_source(source)
    assert time.perf_counter() - start < 3


def test_the_table_shows_the_facts() -> None:
    text = shown(inspect_source(open_source("embedded", "test"), 50))
    for part in ("1,000", "28 / 28 / 28", "1 (files: 50 with 1)", "Ankle boot"):
        assert part in text


def test_of_many_classes_and_unreadable_files_the_table_shows_some() -> None:
    images = np.zeros((100, 1, 1, 1), np.uint8)
    facts = inspect_source(ArraySource("x", images, np.arange(100)))
    assert "and 60 more, down to 1" in shown(facts)


def test_nothing_to_look_at_is_an_error(tmp_path: pathlib.Path) -> None:
    empty = ArraySource("nothing", np.zeros((0, 2, 2, 1), np.uint8))
    with pytest.raises(ValueError, match="nothing has no examples to look at"):
        inspect_source(empty)
    with pytest.raises(ValueError, match="sample must be at least 1, or None for all"):
        inspect_source(open_source("embedded"), 0)
    (tmp_path / "a.png").write_bytes(b"no image")
    source = open_source(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match=r"none of 1 images of folder:.*the first: a\.png: "):
        inspect_source(source)
    with pytest.raises(ValueError, match="none of 1 images of folder:"):
        source_sheet(source)


def test_a_sheet_keeps_aspects_and_writes_labels() -> None:
    images = [np.full((10, 20, 1), 0, np.uint8), np.full((300, 100, 3), 65_535, np.uint16)]
    sheet = contact_sheet(images, ["wide", ""], tile=40)
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    black = sheet[:, : sheet.shape[1] // 2].max(axis=2) == 0
    rows, columns = np.flatnonzero(black.sum(1) == 40), np.flatnonzero(black[8:48].sum(0) == 20)
    assert (len(rows), len(columns)) == (20, 40)
    caption = sheet[50:, : sheet.shape[1] // 2]
    assert caption.min() < 100
    assert sheet[50:, sheet.shape[1] // 2 :].min() == 255


def test_a_long_caption_is_cut_to_its_tile() -> None:
    images = [np.full((8, 8, 3), 255, np.uint8)] * 2
    sheet = contact_sheet(images, ["a very long name of a class", ""], tile=48)
    assert sheet[:, 8 + 48 : 8 + 48 + 8].min() == 255


def test_a_sheet_of_a_source_has_its_images_and_passes_over_unreadable(
    tmp_path: pathlib.Path,
) -> None:
    for number in range(3):
        save(tmp_path, f"a/{number}.png", smooth_image())
    whole = source_sheet(open_source(f"folder:{tmp_path}"))
    (tmp_path / "a" / "1.png").write_bytes(b"no image")
    assert source_sheet(open_source(f"folder:{tmp_path}")).shape[1] < whole.shape[1]


def test_a_sheet_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="a sheet of 0 images"):
        contact_sheet([], [])
    with pytest.raises(ValueError, match="1 images with 2 captions"):
        contact_sheet([np.zeros((2, 2, 1), np.uint8)], ["a", "b"])
