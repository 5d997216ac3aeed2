"""Weights to and from Hugging Face transformers; where it is installed, against its own code."""

import functools
import json
from types import MappingProxyType

import jax
import numpy as np
import pytest

from mim_jax.conversion import huggingface
from mim_jax.conversion.check import TOLERANCE, fixed_noise, largest_difference, outputs
from mim_jax.conversion.export import FORMATS
from mim_jax.conversion.files import read_state_dict
from mim_jax.conversion.huggingface import from_huggingface, to_huggingface
from mim_jax.conversion.weights import read_weights
from mim_jax.method import parameter_shapes
from mim_jax.training.tree import flatten
from tests.conversion.libraries import need_transformers
from tests.conversion.models import build, classifier_config, mae_config, variables, written
from tests.methods.tiny import tiny_config, tiny_mae, tiny_params

OBLONG = {"data.image_size": (8, 12), "model.patch_size": (2, 4)}

EXPORTS = {
    "MAE": ("hf-mae", mae_config),
    "MAE with stacked blocks": ("hf-mae", lambda: mae_config({"model.scan": True})),
    "MAE of another size": (
        "hf-mae",
        lambda: mae_config({"data.image_size": (16, 16), "model.normalize_target": False}),
    ),
    "encoder": ("hf-vit", mae_config),
    "oblong encoder": ("hf-vit", lambda: tiny_config(OBLONG)),
    "encoder of a classifier": ("hf-vit", lambda: classifier_config("cls")),
    "classifier": ("hf-classifier", lambda: classifier_config("cls")),
    "oblong classifier": ("hf-classifier", lambda: classifier_config("cls", OBLONG)),
}
"""Format and config by title."""

OUTPUTS = {
    "hf-mae": {"tokens", "prediction", "loss"},
    "hf-vit": {"tokens"},
    "hf-classifier": {"tokens", "logits"},
}


def official() -> dict[str, np.ndarray]:
    return tiny_mae().layout().save(tiny_params())


def random_images(config) -> np.ndarray:
    shape = (3, *config.data.image_size, config.data.channels)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@functools.cache
def example(title: str):
    kind, make = EXPORTS[title]
    config = make()
    method = build(config)
    return kind, config, method, variables(method)


def exported(title: str, folder):
    kind, config, method, given = example(title)
    return written(kind, config, method, given, folder)


@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_names_translate_there_and_back_exactly(prefix):
    again = from_huggingface(to_huggingface(official(), prefix))
    assert set(again) == set(official())
    for key, value in official().items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)


def test_the_names_are_those_of_the_hub():
    """As in the published `facebook/vit-mae-base`."""
    names = set(to_huggingface(official()))
    block = "vit.encoder.layer.1"
    assert {
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight",
        f"{block}.attention.attention.query.weight",
        f"{block}.attention.attention.key.bias",
        f"{block}.attention.output.dense.weight",
        f"{block}.intermediate.dense.bias",
        f"{block}.output.dense.weight",
        f"{block}.layernorm_before.weight",
        f"{block}.layernorm_after.bias",
        "vit.layernorm.weight",
        "decoder.decoder_embed.weight",
        "decoder.mask_token",
        "decoder.decoder_pos_embed",
        "decoder.decoder_layers.0.attention.attention.value.weight",
        "decoder.decoder_norm.bias",
        "decoder.decoder_pred.weight",
    } <= names
    assert len(names) == len(official()) + 2 * 2 * (2 + 2)  # two more for each projection


def test_query_key_and_value_are_thirds_of_the_projection():
    theirs, ours = to_huggingface(official()), official()["blocks.0.attn.qkv.weight"]
    for i, name in enumerate(("query", "key", "value")):
        piece = theirs[f"vit.encoder.layer.0.attention.attention.{name}.weight"]
        np.testing.assert_array_equal(piece, ours[16 * i : 16 * (i + 1)])


def test_both_names_of_the_decoders_blocks_are_read():
    later = {
        key.replace("decoder_layers.", "decoder_encoder.layer."): value
        for key, value in to_huggingface(official()).items()
    }
    assert any("decoder_encoder" in key for key in later)
    assert set(from_huggingface(later)) == set(official())


def test_unknown_keys_and_incomplete_projections_are_kept_for_the_list_of_problems():
    theirs = to_huggingface(official())
    del theirs["vit.encoder.layer.0.attention.attention.key.bias"]
    theirs["vit.embeddings.mask_token"] = np.zeros(1)
    theirs["adapter.3.scale.weight"] = np.zeros(1)
    with pytest.raises(ValueError) as error:
        tiny_mae().layout().load(from_huggingface(theirs), tiny_params())
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "missing: blocks.0.attn.qkv.bias",
        "unexpected: adapter.3.scale.weight",
        "unexpected: blocks.0.attn.q.bias",
        "unexpected: blocks.0.attn.v.bias",
        "unexpected: vit.embeddings.mask_token",
    ]


def test_a_key_without_a_name_there_is_an_error_when_saved():
    with pytest.raises(KeyError, match=r"no name for fc_norm\.weight"):
        to_huggingface({"fc_norm.weight": np.zeros(2)})


def test_the_folder_says_what_the_model_and_its_input_are(tmp_path):
    exported("MAE", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["ViTMAEForPreTraining"]
    assert (config["hidden_act"], config["layer_norm_eps"]) == ("gelu", 1e-6)
    assert (config["image_size"], config["patch_size"]) == (12, 4)
    assert (config["mask_ratio"], config["norm_pix_loss"]) == (0.5, True)
    assert config["decoder_intermediate_size"] == 32
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.4, 0.5, 0.6]
    assert processor["image_std"] == [0.2, 0.3, 0.25]
    assert processor["size"] == {"height": 12, "width": 12}
    assert processor["rescale_factor"] == 1 / 255


def test_oblong_sizes_are_lists_of_height_and_width(tmp_path):
    config = json.loads((exported("oblong encoder", tmp_path) / "config.json").read_text())
    assert (config["image_size"], config["patch_size"]) == ([8, 12], [2, 4])


def test_samples_of_16_bits_are_rescaled_by_their_range(tmp_path):
    config = mae_config({"data.bits": 16})
    method = build(config)
    written("hf-mae", config, method, variables(method), tmp_path)
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["rescale_factor"] == 1 / 65535


def test_a_classifier_names_its_classes_and_its_kind_of_problem(tmp_path):
    config = classifier_config("cls", {"model.labels": "multi"})
    method = build(config)
    written("hf-classifier", config, method, variables(method), tmp_path)
    given = json.loads((tmp_path / "config.json").read_text())
    assert len(given["id2label"]) == len(given["label2id"]) == 5
    assert given["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_folder_named_like_a_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="this format is a folder"):
        exported("MAE", tmp_path / name)
    assert not (tmp_path / name).exists()


def test_weights_in_several_files_are_read_by_their_index(tmp_path):
    folder = exported("MAE", tmp_path)
    whole = read_state_dict(folder / "model.safetensors")
    parts = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(whole))}
    for part in set(parts.values()):
        state = {name: value for name, value in whole.items() if parts[name] == part}
        huggingface.write_state_dict(folder / part, state)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    assert set(read_weights(folder).state) == set(from_huggingface(whole))


class TestAgainstTransformers:
    @pytest.fixture(autouse=True)
    def _library(self):
        self.torch, self.transformers = need_transformers()

    @pytest.mark.parametrize("title", EXPORTS)
    def test_it_computes_what_we_compute(self, title, tmp_path):
        kind, config, method, given = example(title)
        exported(title, tmp_path)
        images, noise = random_images(config), np.tile(fixed_noise(method)[:1], (3, 1))
        theirs = FORMATS[kind].forward(tmp_path, images, noise)
        ours = outputs(method, given, images, noise)
        assert set(theirs) == OUTPUTS[kind]
        for name in theirs:
            assert largest_difference({name: ours[name]}, {name: theirs[name]}) < TOLERANCE, name

    def saved(self, tmp_path, name, config, tables=MappingProxyType({})):
        """A model with transformers' own random weights, written by its own code."""
        sizes = dict(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            patch_size=4,
            num_channels=3,
            image_size=12,
            layer_norm_eps=1e-6,
            initializer_range=0.3,
        )
        settings = getattr(self.transformers, config.pop("class"))(**sizes, **config)
        model = getattr(self.transformers, name)(settings)
        with self.torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * self.torch.randn_like(parameter))
            for key, table in tables.items():
                # transformers 5 starts a new model with tables of zeros.
                model.get_parameter(key).copy_(self.torch.from_numpy(table)[None])
        model.save_pretrained(tmp_path)
        return model.eval()

    def loaded(self, tmp_path, method):
        weights = read_weights(tmp_path)
        params = method.layout().load(weights.state, parameter_shapes(method))
        return weights, {"params": params}

    def test_an_mae_that_it_saved_gives_the_same_loss_here(self, tmp_path):
        config = mae_config()
        decoder = dict(
            decoder_hidden_size=8,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
            mask_ratio=0.5,
            norm_pix_loss=True,
        )
        method = build(config)
        tables = {
            "vit.embeddings.position_embeddings": method.encoder.position_table(),
            "decoder.decoder_pos_embed": method.model.decoder.position_table(),
        }
        given = {"class": "ViTMAEConfig", **decoder}
        model = self.saved(tmp_path, "ViTMAEForPreTraining", given, tables)
        weights, ours = self.loaded(tmp_path, method)
        assert weights.format == "hf-mae"
        assert set(flatten(ours["params"])) == set(flatten(parameter_shapes(method)))
        images, noise = random_images(config), np.tile(fixed_noise(method)[:1], (3, 1))
        with self.torch.no_grad():
            pixels = self.torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            theirs = model(pixels, noise=self.torch.from_numpy(noise))
        given = outputs(method, ours, images, noise)
        assert float(given["loss"]) == pytest.approx(float(theirs.loss), rel=TOLERANCE)
        difference = {"prediction": theirs.logits.numpy()}
        assert largest_difference(given, difference) < TOLERANCE

    def test_a_classifier_that_it_saved_gives_the_same_logits_here(self, tmp_path):
        config = classifier_config("cls")
        given = {"class": "ViTConfig", "num_labels": 5}
        model = self.saved(tmp_path, "ViTForImageClassification", given)
        method = build(config)
        weights, ours = self.loaded(tmp_path, method)
        assert weights.format == "hf-classifier"
        images = random_images(config)
        with self.torch.no_grad():
            logits = model(self.torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits
        ours = jax.jit(method.logits)(ours, images)
        assert largest_difference({"logits": ours}, {"logits": logits.numpy()}) < TOLERANCE

    def test_a_vit_that_it_saved_gives_the_encoder_and_its_pooler_is_named(self, tmp_path):
        model = self.saved(tmp_path, "ViTModel", {"class": "ViTConfig"})
        method = build(classifier_config("cls"))
        weights, ours = self.loaded(tmp_path, method)
        assert weights.notes == ("not read: pooler.dense.bias, pooler.dense.weight",)
        assert set(ours["params"]) == {"encoder"}
        images = random_images(classifier_config("cls"))
        with self.torch.no_grad():
            pixels = self.torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            tokens = model(pixels).last_hidden_state.numpy()
        given = jax.jit(method.encoder.apply)({"params": ours["params"]["encoder"]}, images)[0]
        assert largest_difference({"tokens": given}, {"tokens": tokens}) < TOLERANCE

    def test_its_processor_prepares_an_image_as_we_do(self, tmp_path):
        from mim_jax.data.on_device import normalize

        config = example("MAE")[1]
        exported("MAE", tmp_path)
        processor = self.transformers.AutoImageProcessor.from_pretrained(tmp_path)
        image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
        theirs = processor(images=image, return_tensors="np")["pixel_values"]
        ours = np.asarray(normalize(image[None], config.data.mean, config.data.std))
        np.testing.assert_allclose(theirs.transpose(0, 2, 3, 1), ours, atol=1e-5)
