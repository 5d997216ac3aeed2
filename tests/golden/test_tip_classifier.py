"""Fine-tuning of TIP against the official code: logits of whole and partial tables, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax import losses
from mim_jax.method import variable_shapes
from mim_jax.methods.parts.table_image import TableImageEncoders
from mim_jax.methods.tip_classifier import TIPClassifier
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
)
from tests.golden.test_tip import sizes

KINDS = pytest.mark.parametrize("ensemble", [True, False], ids=["ensemble", "single"])
finetuning = pytest.mark.parametrize("path", case_params("tip", "finetune"))


def build(cfg: dict, ensemble: bool) -> TIPClassifier:
    own = {
        "model.num_classes": cfg["config"]["num_classes"],
        "model.ensemble": ensemble,
        "model.finetune": "trainable",
    }
    method = TIPClassifier.build(configs.load("tip_classifier", {**sizes(cfg), **own}))
    # The recorded state is that of the backbone, which a Lightning file has under "model.".
    return TIPClassifier(method.model, key_prefix="")


@functools.cache
def read(path) -> Case:
    return Case(path)


def official(case: Case, ensemble: bool) -> dict[str, np.ndarray]:
    """The recorded parameters, in the names of the single head if there is but one."""
    state = case.group("param")
    if ensemble:
        return state
    renamed = {k.replace("classifier_multimodal", "classifier"): v for k, v in state.items()}
    return {k: v for k, v in renamed.items() if not k.startswith("classifier_")}


def load(method: TIPClassifier, state):
    table = method.layout()
    return table.parted(table.load(state, table.joined(variable_shapes(method))))


@functools.cache
def results(path, ensemble: bool):
    """Method, variables, loss, logits and gradient with missing cells, and logits without."""
    case = read(path)
    method = build(case.cfg, ensemble)
    variables = load(method, official(case, ensemble))
    batch = {
        "image": jnp.asarray(images_nhwc(case["in/image"])),
        "table": jnp.asarray(case["in/table"]),
    }
    missing = {**batch, "table_missing": jnp.asarray(case["in/missing_mask"])}

    def loss_of(params, batch):
        logits, _ = method.forward({**variables, "params": params}, batch, train=False)
        return losses.cross_entropy(logits, jnp.asarray(case["in/labels"])), logits

    with jax.default_matmul_precision("highest"):
        step = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
        (loss, logits), gradient = step(variables["params"], missing)
        complete = method.logits(variables, batch["image"], batch["table"])
    return method, variables, loss, logits, gradient, complete


@finetuning
@KINDS
def test_loss_and_logits_match(path, ensemble):
    case, kind = read(path), "ensemble" if ensemble else "single"
    _, _, loss, logits, _, complete = results(path, ensemble)
    assert_close(loss, case[f"out/loss_{kind}"], "loss")
    assert_close(logits, case[f"out/logits_{kind}"], "logits")
    assert_close(complete, case[f"out/logits_{kind}_complete"], "logits of complete tables")


@finetuning
def test_tokens_of_partial_tables_match(path):
    case = read(path)
    method, variables, *_ = results(path, True)
    table = method.model.table_encoder
    tokens = table.apply(
        {"params": variables["params"]["table_encoder"]},
        jnp.asarray(case["in/table"]),
        jnp.asarray(case["in/missing_mask"]),
    )
    assert_close(tokens, case["out/tabular_tokens_missing"], "table tokens")
    images = jnp.asarray(images_nhwc(case["in/image"]))
    seen = method.model.apply(variables, images, method=TableImageEncoders.see)
    maps = case["out/image_feature_map"]
    expected = maps.reshape(*maps.shape[:2], -1).transpose(0, 2, 1)
    assert_close(seen.tokens, expected, "image map")


@finetuning
@KINDS
def test_all_gradients_match(path, ensemble):
    case = read(path)
    method, variables, _, _, gradient, _ = results(path, ensemble)
    joined = method.layout().joined({**variables, "params": jax.device_get(gradient)})
    ours = method.layout().save(joined)
    golden = case.group("grad/single")
    if ensemble:
        whole = case.group("grad")
        golden = {key: value for key, value in whole.items() if not key.startswith("single/")}
        assert set(golden) == {k for k in ours if "running_" not in k and "num_batches" not in k}
    for key, value in golden.items():
        key = key if ensemble else key.replace("classifier_multimodal", "classifier")
        assert_gradient_close(ours[key], value, key, relative=5e-4)


@finetuning
@KINDS
def test_official_checkpoint_round_trip_is_exact(path, ensemble):
    case = read(path)
    state = official(case, ensemble)
    method = build(case.cfg, ensemble)
    prefixed = TIPClassifier(method.model)
    for given, reader in (
        (state, method),
        ({f"model.{key}": value for key, value in state.items()}, prefixed),
    ):
        assert reader.sized_like(given, {}) == reader
        saved = reader.layout().save(reader.layout().joined(load(reader, given)))
        assert set(saved) == set(given)
        for key, value in given.items():
            np.testing.assert_array_equal(saved[key], value, err_msg=key)
