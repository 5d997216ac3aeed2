import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from mim_jax import config as configs
from mim_jax.data.mixing import Mixing, cutmix, cutmix_box, mixup, random_erasing
from mim_jax.training.sharding import batch_sharding, make_mesh

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
CLASSES = 5
RECIPE = Mixing(mixup=0.8, cutmix=1.0, smoothing=0.1)

mixed_by_recipe = jax.jit(RECIPE, static_argnums=3)


def images_and_targets(batch: int = 6, height: int = 12, width: int = 16):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch, height, width, 3)).astype(np.float32)
    targets = np.eye(CLASSES, dtype=np.float32)[rng.integers(CLASSES, size=batch)]
    return images, targets


def box_mask(box, height: int, width: int) -> np.ndarray:
    top, bottom, left, right = np.asarray(box).tolist()
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def boxes(share: float, size: tuple[int, int], count: int = 4000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.vmap(lambda key: cutmix_box(key, size, jnp.float32(share)))(keys))


@pytest.mark.parametrize("batch", [6, 7])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixup_blends_with_the_reversed_batch(batch, share):
    images, targets = images_and_targets(batch)
    mixed, mixed_targets = mixup(images, targets, jnp.float32(share))
    expected = share * images + (1 - share) * images[::-1]
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)
    expected = share * targets + (1 - share) * targets[::-1]
    np.testing.assert_allclose(mixed_targets, expected, atol=1e-6)


@pytest.mark.parametrize(
    "box", [(2, 8, 3, 9), (0, 12, 0, 16), (5, 5, 4, 9), (0, 3, 14, 16), (11, 12, 0, 1)]
)
def test_cutmix_takes_the_box_from_the_partner_and_nothing_else(box):
    images, targets = images_and_targets()
    mixed, mixed_targets = cutmix(images, targets, jnp.asarray(box))
    mask = box_mask(box, 12, 16)
    np.testing.assert_array_equal(mixed, np.where(mask[..., None], images[::-1], images))
    share = 1 - mask.sum() / mask.size  # the area to the pixel
    expected = share * targets + (1 - share) * targets[::-1]
    np.testing.assert_allclose(mixed_targets, expected, atol=1e-7)


@few
@given(seed=seeds, share=st.floats(0, 1), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_a_box_is_that_of_timm_for_its_centre(seed, share, size):
    """With the draws of the centre taken back from a box that nothing is cut off from."""
    key, share = jax.random.key(seed), np.float32(share)
    centre = np.asarray(jax.random.randint(key, (2,), 0, jnp.asarray(size)))
    ratio = np.sqrt(1 - share)
    cut = np.array([int(np.float32(side) * ratio) for side in size])
    low = np.clip(centre - cut // 2, 0, size)
    high = np.clip(centre + cut // 2, 0, size)
    expected = [low[0], high[0], low[1], high[1]]
    np.testing.assert_array_equal(cutmix_box(key, size, share), expected)


def test_boxes_are_cut_off_at_the_border_and_their_centres_are_uniform():
    drawn = boxes(0.75, (20, 40))
    assert drawn.min() == 0 and drawn[:, 1].max() == 20 and drawn[:, 3].max() == 40
    whole = (drawn[:, 1] - drawn[:, 0] == 10) & (drawn[:, 3] - drawn[:, 2] == 20)
    # Centres 5..15 of 20 rows and 10..30 of 40 columns leave the box whole.
    assert whole.mean() == pytest.approx(11 / 20 * 21 / 40, abs=0.03)
    centres = np.bincount(drawn[whole, 2] + 10, minlength=40)[10:31]
    assert stats.chisquare(centres).pvalue > 0.001


def test_no_share_for_the_partner_is_an_empty_box_and_all_of_it_the_largest():
    empty, largest = boxes(1.0, (8, 8), 50), boxes(0.0, (8, 8), 50)
    assert np.all((empty[:, 0] == empty[:, 1]) & (empty[:, 2] == empty[:, 3]))
    assert np.all((largest[:, 1] - largest[:, 0] >= 4) & (largest[:, 3] - largest[:, 2] >= 4))


def shares(mixing: Mixing, count: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Share of what is kept in each of many batches, and whether it was cutmix."""
    images = jnp.zeros((2, 64, 64, 1)).at[0].set(1.0)

    def one(key):
        mixed, targets = mixing(key, images, jnp.asarray([0, 1]), 2)
        return targets[0, 0], jnp.all((mixed[0] == 0) | (mixed[0] == 1)), mixed[0].mean()

    keys = jax.random.split(jax.random.key(0), count)
    share, is_cutmix, kept = jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(keys))
    np.testing.assert_allclose(share, kept, atol=1e-6)  # targets follow the pixels
    return share, is_cutmix


def test_shares_of_mixup_are_beta_distributed():
    share, is_cutmix = shares(Mixing(mixup=0.8))
    inside = (share > 1e-4) & (share < 1 - 1e-4)  # both ends look like cutmix
    assert not is_cutmix[inside].any()
    assert stats.kstest(share, stats.beta(0.8, 0.8).cdf).pvalue > 0.001


def test_shares_of_cutmix_are_those_of_its_clipped_boxes():
    share, is_cutmix = shares(Mixing(cutmix=1.0))
    assert is_cutmix.all()
    rng = np.random.default_rng(0)
    half = (64 * np.sqrt(1 - rng.beta(1, 1, 20000))).astype(int) // 2
    centre = rng.integers(0, 64, (2, 20000))
    sides = np.minimum(centre + half, 64) - np.maximum(centre - half, 0)
    # In whole pixels, since rounding would tear equal shares apart.
    assert stats.ks_2samp(np.round(share * 64**2), 64**2 - sides.prod(axis=0)).pvalue > 0.001


def test_cutmix_is_chosen_as_often_as_asked():
    _, is_cutmix = shares(Mixing(mixup=5.0, cutmix=1.0, cutmix_probability=0.3))
    assert is_cutmix.mean() == pytest.approx(0.3, abs=0.04)


@few
@given(seed=seeds, batch=st.sampled_from([5, 8]))
def test_targets_of_single_labels_sum_to_one_and_name_only_the_pair(seed, batch):
    images = np.zeros((batch, 8, 8, 1), np.float32)
    labels = np.random.default_rng(seed).integers(0, CLASSES, batch)
    _, targets = mixed_by_recipe(jax.random.key(seed), images, labels, CLASSES)
    assert targets.shape == (batch, CLASSES) and targets.dtype == jnp.float32
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
    pair = np.eye(CLASSES)[labels] + np.eye(CLASSES)[labels[::-1]]
    np.testing.assert_allclose(np.asarray(targets)[pair == 0], 0.1 / CLASSES, atol=1e-6)
    np.testing.assert_allclose(np.asarray(targets)[pair == 2], 0.92, atol=1e-6)


def test_several_labels_are_mixed_and_not_smoothed():
    images, _ = images_and_targets(4)
    labels = np.asarray([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]], np.uint8)
    _, targets = mixed_by_recipe(jax.random.key(3), images, labels, 3)
    assert targets[0, 1] == 1  # both have it
    assert targets[1, 0] == targets[2, 0] == 0  # neither has it
    share = 1 - targets[0, 2]
    np.testing.assert_allclose(targets[1, 1], 1 - share, atol=1e-6)
    np.testing.assert_allclose(targets[2, 1], share, atol=1e-6)


def test_without_mixing_targets_are_smoothed_and_images_untouched():
    images, targets = images_and_targets()
    labels = jnp.asarray(targets.argmax(axis=1))
    same, smooth = Mixing(smoothing=0.1)(jax.random.key(0), images, labels, CLASSES)
    assert same is images
    np.testing.assert_allclose(smooth, np.where(targets == 1, 0.92, 0.02), atol=1e-6)
    _, plain = Mixing()(jax.random.key(0), images, labels, CLASSES)
    np.testing.assert_array_equal(plain, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -0.1}, r"mixup is -0\.1 and cutmix is 0\.0"),
        ({"cutmix": -1.0}, r"cutmix is -1\.0"),
        ({"cutmix_probability": 1.1}, r"cutmix_probability is 1\.1"),
        ({"smoothing": 1.0}, r"smoothing is 1\.0; it must be in \[0, 1\)"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Mixing(**options)


def test_a_mesh_mixes_the_global_batch_as_one_device_does():
    mesh = make_mesh(configs.ml_collections.ConfigDict(dict(data=4, fsdp=2, tensor=1)))
    images, targets = images_and_targets(16)
    labels = targets.argmax(axis=1)

    @jax.jit
    def step(key, images, labels):
        erased = random_erasing(key, images, 0.5)
        return RECIPE(key, erased, labels, CLASSES)

    rows = batch_sharding(mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    for seed in range(3):
        key = jax.random.key(seed)
        expected = step(key, images, labels)
        on_mesh = step(
            jax.device_put(key, replicated),
            jax.device_put(images, rows),
            jax.device_put(labels, rows),
        )
        for ours, one_device in zip(on_mesh, expected, strict=True):
            assert ours.sharding.is_equivalent_to(rows, ours.ndim)
            np.testing.assert_allclose(ours, one_device, atol=1e-6)


@functools.cache
def erased_boxes(batch: int, height: int, width: int, probability: float) -> np.ndarray:
    """Pixels that changed in black images, bool `[batch, height, width]`."""
    images = jnp.zeros((batch, height, width, 1))
    erase = jax.jit(lambda key: random_erasing(key, images, probability))
    return np.asarray(erase(jax.random.key(0)) != 0)[..., 0]


def sides(changed: np.ndarray) -> tuple[int, int]:
    """Height and width of the changed rectangle."""
    rows, columns = np.where(changed.any(1))[0], np.where(changed.any(0))[0]
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    assert changed.sum() == height * width  # all of the rectangle and nothing beside it
    return int(height), int(width)


def test_the_asked_share_of_images_is_erased():
    erased = erased_boxes(1500, 24, 48, 0.25).any(axis=(1, 2))
    assert erased.mean() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 1500) ** 0.5)
    assert erased_boxes(1500, 24, 48, 1.0).any(axis=(1, 2)).mean() > 0.999  # ten tries
    images = jnp.zeros((2, 8, 8, 1))
    assert random_erasing(jax.random.key(0), images, 0.0) is images


def sides_of_timm(height: int, width: int, count: int) -> np.ndarray:
    """The loop of timm written out, with numpy's draws."""
    rng = np.random.default_rng(1)
    accepted = []
    for _ in range(count):
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if w < width and h < height:
                accepted.append((h, w))
                break
    return np.asarray(accepted)


def test_erased_boxes_are_distributed_as_those_of_timm():
    changed = erased_boxes(1500, 24, 48, 1.0)
    ours = np.asarray([sides(pixels) for pixels in changed if pixels.any()])
    theirs = sides_of_timm(24, 48, 1500)
    for axis in (0, 1):
        assert stats.ks_2samp(ours[:, axis], theirs[:, axis]).pvalue > 0.001


def test_erased_boxes_are_anywhere_in_the_image():
    share = erased_boxes(1500, 24, 48, 1.0).mean(axis=0)
    np.testing.assert_allclose(share, share[::-1], atol=0.06)
    np.testing.assert_allclose(share, share[:, ::-1], atol=0.06)
    assert share.min() > 0  # the corners too


def test_an_image_on_which_no_box_fits_stays_whole():
    """Two rows, of which every box within the limits of area and aspect takes both."""
    assert not erased_boxes(100, 2, 200, 1.0).any()


def test_erased_pixels_are_gaussian_noise_of_their_own():
    images = jnp.full((40, 24, 24, 3), 9.0)
    erased = np.asarray(jax.jit(lambda key: random_erasing(key, images, 1.0))(jax.random.key(0)))
    noise = erased[erased != 9]
    assert stats.kstest(noise, stats.norm.cdf).pvalue > 0.001
    assert len(np.unique(noise)) > 0.99 * len(noise)


@pytest.mark.parametrize("probability", [-0.1, 1.5])
def test_a_probability_of_erasing_outside_its_range_is_an_error(probability):
    with pytest.raises(ValueError, match=f"the probability of erasing is {probability}"):
        random_erasing(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), probability)
