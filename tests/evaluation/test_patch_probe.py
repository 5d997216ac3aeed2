import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mim_jax.data import open_source
from mim_jax.evaluation import evaluate, labelled_data
from mim_jax.evaluation.patch_probe import (
    HEADS,
    IGNORED,
    PatchHead,
    macro_recall,
    patch_global_recall,
    patch_local_recall,
)
from tests.evaluation.toy import Toy, toy_config, toy_variables

CLASSES, TOKENS, WIDTH = 3, 6, 8


def scenes(seed: int, examples: int = 96):
    """Tokens that tell the class of their own patch, and that class."""
    centres = np.random.default_rng(7).normal(size=(CLASSES, WIDTH)) * 2
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=(examples, TOKENS))
    return centres[labels] + 0.3 * random.normal(size=(examples, TOKENS, WIDTH)), labels


def shifted_scenes(seed: int, examples: int = 96):
    """Tokens that tell the class of the patch before theirs."""
    tokens, labels = scenes(seed, examples)
    return np.roll(tokens, 1, axis=1), labels


def present(labels: np.ndarray) -> np.ndarray:
    return (labels[..., None] == np.arange(CLASSES)).any(axis=1).astype(int)


@pytest.mark.parametrize("head", HEADS)
def test_classes_that_tokens_tell_are_found(head):
    (train, labels), (test, truth) = scenes(0), scenes(1, 50)
    assert patch_local_recall(train, labels, test, truth, head=head) > 0.97


def test_a_block_finds_what_lies_in_another_token_and_a_linear_head_does_not():
    (train, labels), (test, truth) = shifted_scenes(0, 512), shifted_scenes(1, 64)
    recall = {
        head: patch_local_recall(train, labels, test, truth, head=head, lr=1e-2, epochs=40)
        for head in HEADS
    }
    assert recall["block"] > 0.8
    assert recall["linear"] < 0.45  # chance is 1/3


def test_tokens_that_tell_nothing_give_chance():
    (train, labels), (test, truth) = scenes(0), scenes(1)
    random = np.random.default_rng(2)
    train, test = (random.normal(size=x.shape) for x in (train, test))
    assert abs(patch_local_recall(train, labels, test, truth) - 1 / CLASSES) < 0.1


@pytest.mark.parametrize("head", HEADS)
def test_classes_of_the_image_are_found_from_its_patches(head):
    (train, labels), (test, truth) = scenes(0, 256), scenes(1)
    arrays = (train, present(labels), test, present(truth))
    assert patch_global_recall(*arrays, head=head) > 0.85


def test_one_class_for_each_image_is_accepted_too():
    labels, truth = (scenes(seed)[1][:, :1].repeat(TOKENS, axis=1) for seed in (0, 1))
    centres = np.random.default_rng(7).normal(size=(CLASSES, WIDTH)) * 2
    arrays = (centres[labels], labels[:, 0], centres[truth], truth[:, 0])
    assert patch_global_recall(*arrays) == 1.0


def test_patches_without_a_class_neither_teach_nor_count():
    (train, labels), (test, truth) = scenes(0), scenes(1)
    hidden = np.random.default_rng(3).random(labels.shape) < 0.5
    wrong, missing = labels.copy(), labels.copy()
    wrong[hidden] = (labels[hidden] + 1) % CLASSES
    missing[hidden] = IGNORED
    seen = truth.copy()
    seen[:, 0] = IGNORED
    changed = test.copy()
    changed[:, 0] = 100.0
    recall = patch_local_recall(train, missing, test, seen)
    assert recall > 0.97 > patch_local_recall(train, wrong, test, seen)
    assert recall == patch_local_recall(train, missing, changed, seen)


def test_recall_is_the_mean_over_the_classes_that_there_are():
    truth = np.array([0, 0, 0, 0, 2])
    assert macro_recall(truth, np.array([0, 0, 1, 1, 2])) == pytest.approx((0.5 + 1) / 2)
    several = np.array([[1, 0, 1], [1, 0, 0]])
    assert macro_recall(several, np.array([[1, 1, 0], [0, 1, 0]])) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no example of any class"):
        macro_recall(np.zeros((2, 3), int), np.zeros((2, 3), int))


def test_same_seed_gives_the_same_recall_and_scale_plays_no_part():
    (train, labels), (test, truth) = scenes(0), scenes(1)
    train, test = train + 2 * np.roll(train, 2, 0), test + 2 * np.roll(test, 2, 0)
    first = patch_local_recall(train, labels, test, truth, epochs=5)
    assert first == patch_local_recall(train, labels, test, truth, epochs=5)
    scaled = patch_local_recall(train * 100 + 5, labels, test * 100 + 5, truth, epochs=5)
    assert abs(first - scaled) < 0.01


def test_the_block_head_is_locality_alignment_s_pool():
    head = PatchHead(5, "block", pooled=True)
    params = head.init(jax.random.key(0), jnp.zeros((2, TOKENS, WIDTH)))["params"]
    assert params["pool"]["positions"].shape == (TOKENS, WIDTH)
    attention = params["pool"]["transformer"]["blocks_0"]["attention"]
    assert set(attention["qkv"]) == {"kernel"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train_labels=np.zeros((96, 5), int)), r"train labels are \(96, 5\)"),
        (dict(test_labels=np.full((96, TOKENS), -2)), "test labels .* range from -2"),
        (dict(train_labels=np.full((96, TOKENS), -1)), "train labels .* to -1"),
        (dict(test_tokens=np.zeros((96, TOKENS, 3))), "must be .* of the same encoder"),
        (dict(train_tokens=np.full((96, TOKENS, WIDTH), np.nan)), "tokens are not finite"),
        (dict(head="conv"), "head is 'conv'; known are linear, block"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    (train, labels), (test, truth) = scenes(0), scenes(1)
    given = dict(train_tokens=train, train_labels=labels, test_tokens=test, test_labels=truth)
    with pytest.raises(ValueError, match=message):
        patch_local_recall(**{**given, **changes})


@pytest.mark.parametrize(
    ("train_labels", "message"),
    [
        (np.zeros((96, 4), int), r"test labels are \(96, 3\).*the same in both splits"),
        (np.full((96, CLASSES), 2), "train labels range from 2 to 2; they must be 0 or 1"),
    ],
)
def test_labels_of_images_that_do_not_fit_are_named(train_labels, message):
    (train, _), (test, truth) = scenes(0), scenes(1)
    with pytest.raises(ValueError, match=message):
        patch_global_recall(train, train_labels, test, present(truth))


def test_protocols_give_a_score_for_each_head():
    scores = evaluate(Toy(), toy_variables(), toy_config(), ["patch_global"])
    assert list(scores) == ["patch_global/linear", "patch_global/block"]
    assert all(score > 0.3 for score in scores.values())  # chance is 0.1


def write_scenes(folder, count, seed, side=28, with_maps=True):
    """Scenes of 2 x 2 grey cells, whose class is their brightness, and their maps."""
    (folder / "segmentation").mkdir(parents=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        cells = random.integers(0, 3, (2, 2))
        classes = np.kron(cells, np.ones((side // 2, side // 2))).astype(np.uint8)
        noise = random.integers(0, 30, classes.shape)
        Image.fromarray((classes * 100 + noise).astype(np.uint8)).save(folder / f"{i:03d}.png")
        if with_maps:
            Image.fromarray(classes).save(folder / "segmentation" / f"{i:03d}.png")
    if not with_maps:
        (folder / "segmentation").rmdir()


def config_of_folder(folder, **changes):
    fields = {
        "evaluate.source": f"folder:{folder}",
        "evaluate.train_split": "train",
        "evaluate.test_split": "test",
        "evaluate.crop_ratio": 1.0,
        "evaluate.batch_size": 16,
    }
    return toy_config(**{**fields, **changes})


def test_maps_beside_unlabelled_images_are_all_that_the_protocols_need(tmp_path, monkeypatch):
    monkeypatch.delitem(HEADS, "block")  # which takes long to compile
    write_scenes(tmp_path / "train", 64, seed=0)
    write_scenes(tmp_path / "test", 20, seed=1)
    protocols = ["patch_local", "patch_global"]
    scores = evaluate(Toy(), toy_variables(), config_of_folder(tmp_path), protocols)
    assert list(scores) == ["patch_local/linear", "patch_global/linear"]
    assert scores["patch_local/linear"] > 0.95  # chance is 1 / 3
    assert scores["patch_global/linear"] > 0.7


def test_labels_of_patches_are_those_of_the_crop_and_slice(tmp_path):
    write_scenes(tmp_path, 9, seed=0, side=56)
    config = config_of_folder(tmp_path, **{"evaluate.crop_ratio": 0.5, "evaluate.batch_size": 4})
    source = open_source(f"folder:{tmp_path}", "train[:7]", channels=1)
    batches = list(labelled_data.patch_crops(config, "train[:7]", (4, 4)))
    labels = np.concatenate([batch["label"][batch["valid"]] for batch in batches])
    # The middle half of the image, as large as the crop, so that no pixel changes.
    maps = np.stack([source.segmentation(i)[14:42, 14:42] for i in range(7)])
    np.testing.assert_array_equal(labels, maps[:, 3::7, 3::7].reshape(7, 16))
    images = np.concatenate([batch["image"][batch["valid"]] for batch in batches])
    assert ((images[:, 3::7, 3::7, 0] // 100).reshape(7, 16) == labels).all()


def test_an_unreadable_image_takes_its_patches_with_it(tmp_path):
    write_scenes(tmp_path, 5, seed=0)
    whole = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(whole[:60])  # the header is there, the pixels are not
    config = config_of_folder(tmp_path)
    (batch,) = labelled_data.patch_crops(config, "train", (4, 4))
    assert batch["valid"].sum() == 4
    assert (batch["label"][~batch["valid"]] == IGNORED).all()
    brightness = batch["image"][batch["valid"]][:, 3::7, 3::7, 0] // 100
    np.testing.assert_array_equal(batch["label"][batch["valid"]], brightness.reshape(4, 16))


def test_maps_of_one_split_alone_are_a_clear_error(tmp_path):
    write_scenes(tmp_path / "train", 4, seed=0)
    write_scenes(tmp_path / "test", 4, seed=1, with_maps=False)
    config = config_of_folder(tmp_path)
    with pytest.raises(ValueError, match=r"\(split 'test'\) has no labels of patches"):
        evaluate(Toy(), toy_variables(), config, ["patch_local"])
    with pytest.raises(ValueError, match=r"\(split 'train'\) has no labels"):
        evaluate(Toy(), toy_variables(), config, ["patch_global"])


def test_maps_without_any_class_are_a_clear_error(tmp_path):
    write_scenes(tmp_path, 4, seed=0)
    for path in (tmp_path / "segmentation").iterdir():
        Image.new("L", (28, 28), 255).save(path)
    config = config_of_folder(tmp_path, **{"evaluate.test_split": "train"})
    with pytest.raises(ValueError, match="train labels of patches must be classes"):
        evaluate(Toy(), toy_variables(), config, ["patch_local"])
    with pytest.raises(ValueError, match="test labels have no example of any class"):
        evaluate(Toy(), toy_variables(), config, ["patch_global"])


def test_labels_of_images_alone_are_a_clear_error():
    with pytest.raises(
        ValueError, match="has no labels of patches, which the protocol 'patch_local'"
    ):
        evaluate(Toy(), toy_variables(), toy_config(), ["patch_local"])
