import dataclasses
import json
import sys

import numpy as np
import pytest

from mim_jax.conversion import check, export
from mim_jax.conversion.export import FORMATS, export_variables
from mim_jax.conversion.files import read_state_dict, write_state_dict
from mim_jax.method import parameter_shapes
from mim_jax.training.tree import flatten
from tests.conversion.libraries import need_timm, need_transformers
from tests.conversion.models import build, classifier_config, mae_config, variables
from tests.methods.tiny import tiny_config
from tests.training.toy import Toy


def exported(config, output, kind, **settings) -> str:
    method = build(config)
    settings = {"run_library": False, **settings}
    return export_variables(method, config, variables(method), output, kind, **settings)


REFUSALS = {
    "an MAE has no classifier": (
        mae_config,
        "hf-classifier",
        "it has no classifier. Formats that can: official, hf-mae, hf-vit, timm.",
    ),
    "transformers has no MAE of oblong images": (
        tiny_config,
        "hf-mae",
        "takes square images only, not 8 x 12. Formats that can: official, hf-vit, timm.",
    ),
    "transformers has no MAE of oblong patches": (
        lambda: mae_config({"model.patch_size": (2, 4)}),
        "hf-mae",
        "takes square patches only, not 2 x 4. Formats that can: official, hf-vit, timm.",
    ),
    "transformers has no classifier of the mean patch": (
        lambda: classifier_config("mean"),
        "hf-classifier",
        "its classifier averages the patch tokens first. Formats that can: official, timm.",
    ),
    "transformers has no ViT without final norm": (
        lambda: classifier_config("mean"),
        "hf-vit",
        "ends in a LayerNorm over all tokens, which this encoder does not have",
    ),
    "a classifier has no decoder": (
        lambda: classifier_config("cls"),
        "hf-mae",
        "method 'finetune' is no MAE, so it has no decoder",
    ),
    "an unknown format": (mae_config, "hf-bert", "known are official, hf-mae, hf-vit"),
}
"""Config, format and message by title."""


@pytest.mark.parametrize("title", REFUSALS)
def test_what_a_format_cannot_hold_is_an_error_that_says_which_can(title, tmp_path):
    config, kind, message = REFUSALS[title]
    with pytest.raises(ValueError) as error:
        exported(config(), tmp_path / "x", kind)
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_a_method_without_a_vit_or_an_official_checkpoint_is_refused(kind):
    with pytest.raises(ValueError, match=r"no (ViT encoder|official checkpoint|decoder)") as error:
        export.find_format(kind, export.Model(Toy(), mae_config(), {}))
    assert "Formats that can" not in str(error.value)


def test_a_refusal_needs_shapes_only():
    config = classifier_config("mean")
    method = build(config)
    model = export.Model(method, config, flatten(parameter_shapes(method)))
    assert export.find_format("timm", model) is FORMATS["timm"]
    with pytest.raises(ValueError, match="Formats that can: official, timm"):
        export.find_format("hf-vit", model)


@pytest.mark.parametrize("kind", ["hf-vit", "timm"])
def test_a_decoder_that_is_left_out_is_named_with_the_formats_that_hold_it(kind, tmp_path):
    note = exported(mae_config(), tmp_path / "x.safetensors" if kind == "timm" else tmp_path, kind)
    assert "left out: decoder (31 arrays); it travels by official, hf-mae" in note.splitlines()


def test_a_head_that_is_left_out_is_named_with_the_formats_that_hold_it(tmp_path):
    note = exported(classifier_config("cls"), tmp_path, "hf-vit")
    expected = "left out: head (2 arrays); it travels by official, hf-classifier, timm"
    assert expected in note.splitlines()


@pytest.mark.parametrize("kind", ["official", "hf-mae"])
def test_the_decoder_travels_where_the_format_has_one(kind, tmp_path):
    output = tmp_path / ("x.safetensors" if kind == "official" else "x")
    note = exported(mae_config(), output, kind)
    assert "left out" not in note
    assert "wrote 62 arrays" in note


def test_the_note_and_the_card_say_which_checks_were_made(tmp_path):
    note = exported(mae_config(), tmp_path / "x.safetensors", "timm", step=7)
    assert "features of 2 fixed images from the weights read back, largest difference 0.0e" in note
    assert "not checked: the forward pass of timm" in note
    card = (tmp_path / "x.md").read_text()
    for text in (
        "Masked Autoencoders Are Scalable Vision Learners",
        "ViT, width 16, 2 blocks, 2 heads, patches of 4 x 4; positions: fixed sine-cosine table",
        "12 x 12 pixels (height x width), 3 channels",
        "samples / 255, minus mean 0.4, 0.5, 0.6, divided by 0.2, 0.3, 0.25",
        "data embedded (train), 30 epochs, batch size 8",
        "step 7",
        "left out: decoder",
        "features of 2 fixed images",
        "not checked: the forward pass of timm",
        "jax ",
    ):
        assert text in card, text


def test_the_card_of_a_folder_begins_with_what_the_hub_reads(tmp_path):
    exported(mae_config(), tmp_path, "hf-mae")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "step" not in card.split("| checkpoint")[0].split("```")[0]


def test_a_missing_library_is_named_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    note = exported(mae_config(), tmp_path, "hf-mae", run_library=True)
    assert "not checked: the forward pass of transformers.ViTMAEForPreTraining (import of" in note
    assert "checked: features" in note


def test_a_broken_library_counts_as_missing(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(check.importlib, "import_module", broken)
    with pytest.raises(ImportError, match="timm is installed, but broken: operator torchvision"):
        check.import_library("timm")


@pytest.mark.parametrize("kind", ["hf-mae", "timm"])
def test_the_librarys_own_forward_pass_is_compared(kind, tmp_path):
    _, library = need_timm() if kind == "timm" else need_transformers()
    output = tmp_path / ("x.safetensors" if kind == "timm" else "x")
    note = exported(mae_config(), output, kind, run_library=True)
    assert f"({library.__name__} {library.__version__}), largest difference" in note
    assert "checked: tokens" in note


def test_a_library_that_computes_something_else_is_an_error(tmp_path, monkeypatch):
    config = mae_config()
    method = build(config)

    def forward(path, images, noise):
        given = check.outputs(method, variables(method), images, noise)["tokens"]
        return {"tokens": given + 1e-3 * np.abs(given).max()}

    fake = dataclasses.replace(FORMATS["timm"], forward=forward)
    monkeypatch.setitem(FORMATS, "timm", fake)
    with pytest.raises(ValueError, match=r"timm's forward pass differs by 0\.001 of the largest"):
        exported(config, tmp_path / "x.safetensors", "timm", run_library=True)


def test_a_file_that_does_not_give_the_weights_back_is_an_error(tmp_path, monkeypatch):
    def write(path, state, model):
        write_state_dict(path, {**state, "cls_token": state["cls_token"] + 1})

    monkeypatch.setitem(FORMATS, "timm", dataclasses.replace(FORMATS["timm"], write=write))
    with pytest.raises(ValueError, match="does not give encoder/cls_token back exactly"):
        exported(mae_config(), tmp_path / "x.safetensors", "timm")


def test_outputs_of_another_shape_or_name_are_an_error():
    ours = {"tokens": np.ones((2, 3))}
    with pytest.raises(ValueError, match=r"tokens has the shape \(2, 4\), but \(2, 3\) here"):
        check.largest_difference(ours, {"tokens": np.ones((2, 4))})
    with pytest.raises(ValueError, match=r"logits has the shape \(2,\), but none here"):
        check.largest_difference(ours, {"logits": np.ones(2)})


def test_a_difference_is_relative_to_the_largest_value_and_nan_is_no_agreement():
    ours = {"a": np.array([1.0, -4.0]), "b": np.array([1.0])}
    assert check.largest_difference(ours, {"a": np.array([1.0, -3.0])}) == 0.25
    assert np.isnan(check.largest_difference(ours, {"a": np.array([np.nan, 0]), "b": ours["b"]}))


def test_weights_in_half_precision_compute_are_checked_in_float32(tmp_path):
    need_transformers()
    config = mae_config({"compute_dtype": "bfloat16"})
    note = exported(config, tmp_path, "hf-mae", run_library=True)
    difference = float(note.split("largest difference ")[-1].split()[0])
    assert difference < 1e-5


def test_a_timm_file_holds_every_parameter_of_a_classifier(tmp_path):
    config = classifier_config("mean")
    exported(config, tmp_path / "x.safetensors", "timm")
    state = read_state_dict(tmp_path / "x.safetensors")
    params = flatten(variables(build(config))["params"])
    assert sum(v.size for v in state.values()) == sum(v.size for v in params.values())
    assert json.loads((tmp_path / "x.json").read_text())["num_classes"] == 5
