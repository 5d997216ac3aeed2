"""From a folder of images to weights for others: adapt, fine-tune, evaluate, convert."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mim_jax.cli import main
from mim_jax.conversion.weights import read_weights

LENGTH = [
    "--config.steps=4",
    "--config.schedule.warmup_epochs=0",
    "--config.log.every_steps=2",
    "--config.log.tensorboard=False",
]
SMALL = [
    "--config.model.width=16",
    "--config.model.depth=2",
    "--config.model.heads=2",
    "--config.model.patch_size=(8, 8)",
    *LENGTH,
]
DECODER = [f"--config.model.decoder_{part}" for part in ("width=8", "depth=1", "heads=2")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Grey 16-bit TIFFs of mixed sizes in two classes, of which the brightness tells the class."""
    folder = tmp_path_factory.mktemp("data") / "my images"
    random = np.random.default_rng(0)
    for i in range(48):
        place = folder / ("dark", "light")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        height, width = random.integers(30, 40, 2)
        values = random.integers(0, 1000, (height, width)) + 2000 * (i % 2)
        Image.fromarray(values.astype(np.uint16)).save(place / f"scan {i}.tif")
    return folder


@pytest.fixture(scope="module")
def adapted(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "adapted"
    arguments = ["train", "--config", "mae:adapt", "--data", str(images), "--workdir", str(run)]
    assert main([*arguments, *SMALL, *DECODER]) == 0
    return run


def test_adapting_derives_settings_and_leaves_gallery_probe_and_weights(adapted):
    config = json.loads((adapted / "config.json").read_text())
    assert (config["data"]["channels"], config["data"]["bits"]) == (1, 16)
    assert config["data"]["image_size"] == [56, 56]
    assert 0 < config["data"]["mean"][0] < 0.05
    assert set(json.loads((adapted / "evaluation.json").read_text())["trained"]) == {
        "knn",
        "linear",
    }
    assert Image.open(next((adapted / "pictures").glob("reconstruction_*.png"))).width > 300
    state = load_file(adapted / "export" / "official.safetensors")
    assert "decoder_pred.weight" in state
    for card in ("official.md", "hf-vit/README.md"):
        assert "mae" in (adapted / "export" / card).read_text()


def test_the_same_command_again_does_nothing_new(adapted, images, capsys):
    arguments = ["train", "--config", "mae:adapt", "--data", str(images)]
    assert main([*arguments, "--workdir", str(adapted), *SMALL, *DECODER]) == 0
    assert "resumed from step 4 of 4" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finetuned(adapted, images, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finetuned"
    command = ["train", "--config", "finetune:adapt", "--data", str(images), "--workdir", str(run)]
    more = ["--init-from", str(adapted), "--config.model.pool=cls", *LENGTH]
    assert main([*command, *more, "--config.evaluate.test_split=train[:24]"]) == 0
    return run


def test_fine_tuning_derives_model_and_images_from_the_run_and_the_data(adapted, finetuned):
    before, now = (json.loads((run / "config.json").read_text()) for run in (adapted, finetuned))
    for field in ("image_size", "channels", "bits", "mean", "std"):
        assert now["data"][field] == before["data"][field]
    for field in ("width", "depth", "heads", "patch_size"):
        assert now["model"][field] == before["model"][field]
    assert (now["model"]["num_classes"], now["data"]["split"]) == (2, "train")
    assert (finetuned / "export" / "timm.md").is_file()


def test_fine_tuning_reports_scores_and_draws_the_confusion_matrix(finetuned):
    scores = json.loads((finetuned / "evaluation.json").read_text())["trained"]
    assert {"classification/top1", "classification/auroc"} <= set(scores)
    assert list((finetuned / "pictures").glob("confusion_*.png"))


def test_a_fine_tuned_run_is_exported_in_every_format_that_holds_it(finetuned, tmp_path, capsys):
    for name, output in (
        ("official", "x.safetensors"),
        ("timm", "t.safetensors"),
        ("hf-classifier", "hf"),
    ):
        path = tmp_path / output
        command = ["convert", "--run", str(finetuned), "--output", str(path), "--format", name]
        assert main(command) == 0
        assert len(read_weights(path).state["head.weight"]) == 2
    assert main(["convert", "--run", str(finetuned), "--output", "y", "--format", "hf-mae"]) == 1
    assert "cannot hold this model" in capsys.readouterr().err


def test_evaluate_scores_the_run_as_its_config_says(finetuned, capsys):
    assert main(["evaluate", "--run", str(finetuned)]) == 0
    assert "top1" in capsys.readouterr().out
    assert (finetuned / "pictures" / "confusion.png").is_file()


def test_several_labels_an_image_are_trained_and_scored(images, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    rows = ["file,label"]
    for i, path in enumerate(sorted(images.rglob("*.tif"))):
        (folder / f"{i}.tif").write_bytes(path.read_bytes())
        rows.append(f"{i}.tif,{('noise', 'noise;bright')[i % 2]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    command = ["train", "--config", "finetune:tiny", "--data", str(folder)]
    splits = ["--config.evaluate.test_split=train[:24]", "--config.batch_size=16"]
    mixing = ["--config.model.mixup=0.8", "--config.model.cutmix=1.0", "--config.model.erasing=0.5"]
    sizes = ["--config.data.image_size=(32, 32)", "--workdir", str(tmp_path / "run")]
    assert main([*command, *SMALL, *splits, *mixing, *sizes]) == 0
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())["trained"]
    assert "classification/mean_average_precision" in scores


def test_an_export_that_cannot_hold_the_model_is_refused_before_training(images, tmp_path, capsys):
    command = ["train", "--config", "mae:adapt", "--data", str(images), "--workdir", str(tmp_path)]
    wrong = ["--config.export.formats=('hf-classifier',)"]
    assert main([*command, *SMALL, *DECODER, *wrong]) == 1
    assert "format 'hf-classifier' cannot hold this model" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
