"""Weights to and from timm; where it is installed, against its own code."""

import json

import jax
import numpy as np
import pytest

from mim_jax.conversion.check import TOLERANCE, fixed_noise, largest_difference, outputs
from mim_jax.conversion.export import FORMATS
from mim_jax.conversion.files import read_state_dict, write_state_dict
from mim_jax.conversion.timm_models import ARCHITECTURE, is_timm, read_arguments
from mim_jax.conversion.weights import read_weights
from mim_jax.method import parameter_shapes
from mim_jax.training.tree import flatten
from tests.conversion.libraries import need_timm
from tests.conversion.models import build, classifier_config, mae_config, variables, written
from tests.methods.tiny import tiny_config, tiny_mae, tiny_params

OBLONG = {"data.image_size": (8, 12), "model.patch_size": (2, 4)}

MODELS = {
    "encoder": mae_config,
    "oblong encoder with stacked blocks": lambda: tiny_config({**OBLONG, "model.scan": True}),
    "classifier of the class token": lambda: classifier_config("cls"),
    "classifier of the mean patch": lambda: classifier_config("mean"),
    "oblong classifier": lambda: classifier_config("mean", OBLONG),
}
"""Configs by title."""


def exported(title: str, folder):
    config = MODELS[title]()
    method = build(config)
    given = variables(method)
    return config, method, given, written("timm", config, method, given, folder / "x.safetensors")


def random_images(config) -> np.ndarray:
    shape = (3, *config.data.image_size, config.data.channels)
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_keys_of_a_vit_are_recognized_and_others_are_not():
    state = tiny_mae().layout().save(tiny_params())
    assert not is_timm(state)  # it has a decoder
    encoder = {key for key in state if not key.startswith(("decoder_", "mask_token"))}
    assert is_timm(encoder)
    assert is_timm(encoder | {"head.weight", "fc_norm.bias"})
    assert not is_timm(encoder | {"dist_token"})
    assert not is_timm({"head.weight"})


def test_a_json_file_holds_the_arguments_and_the_normalization(tmp_path):
    exported("classifier of the mean patch", tmp_path)
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["architecture"] == ARCHITECTURE
    assert content["pretrained_cfg"]["input_size"] == [3, 12, 12]
    assert content["pretrained_cfg"]["mean"] == [0.4, 0.5, 0.6]
    assert content["pretrained_cfg"]["std"] == [0.2, 0.3, 0.25]
    arguments = content["model_args"]
    assert (arguments["global_pool"], arguments["fc_norm"]) == ("avg", True)
    assert (arguments["num_classes"], arguments["class_token"]) == (5, True)
    assert read_arguments(tmp_path / "x.safetensors") == arguments


@pytest.mark.parametrize("content", ['{"lr": 1}', "[1]"])
def test_another_json_file_beside_a_state_dict_tells_nothing(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    assert read_arguments(tmp_path / "x.safetensors") == {}


def test_the_fixed_table_of_an_mae_is_written_as_positions(tmp_path):
    _, method, _, path = exported("encoder", tmp_path)
    np.testing.assert_array_equal(
        read_state_dict(path)["pos_embed"][0], method.encoder.position_table()
    )


class TestAgainstTimm:
    @pytest.fixture(autouse=True)
    def _library(self):
        self.torch, self.timm = need_timm()

    @pytest.mark.parametrize("title", MODELS)
    def test_it_computes_what_we_compute(self, title, tmp_path):
        config, method, given, path = exported(title, tmp_path)
        images, noise = random_images(config), np.tile(fixed_noise(method)[:1], (3, 1))
        theirs = FORMATS["timm"].forward(path, images, noise)
        ours = outputs(method, given, images, noise)
        assert set(theirs) == ({"tokens", "logits"} if "classifier" in title else {"tokens"})
        for name in theirs:
            assert largest_difference({name: ours[name]}, {name: theirs[name]}) < TOLERANCE, name

    def test_a_pth_file_loads_as_well(self, tmp_path):
        config = classifier_config("mean")
        method = build(config)
        written("timm", config, method, variables(method), tmp_path / "x.pth")
        arguments = read_arguments(tmp_path / "x.pth")
        path = str(tmp_path / "x.pth")
        self.timm.create_model(ARCHITECTURE, checkpoint_path=path, **arguments)

    @pytest.mark.parametrize("pool", ["cls", "mean"])
    def test_a_model_of_its_own_gives_the_same_logits_here(self, pool, tmp_path):
        model = self.timm.create_model(
            "vit_tiny_patch16_224",
            img_size=12,
            patch_size=4,
            embed_dim=16,
            depth=2,
            num_heads=2,
            num_classes=5,
            global_pool={"cls": "token", "mean": "avg"}[pool],
        ).eval()
        with self.torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * self.torch.randn_like(parameter))
        state = {key: value.numpy() for key, value in model.state_dict().items()}
        write_state_dict(tmp_path / "x.safetensors", state)
        config = classifier_config(pool)
        method = build(config)
        weights = read_weights(tmp_path / "x.safetensors")
        assert weights.format == "timm"
        shapes = parameter_shapes(method)
        params = method.layout().load(weights.state, shapes)
        assert set(flatten(params)) == set(flatten(shapes))
        images = random_images(config)
        with self.torch.no_grad():
            theirs = model(self.torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        ours = jax.jit(method.logits)({"params": params}, images)
        assert largest_difference({"logits": ours}, {"logits": theirs}) < TOLERANCE
