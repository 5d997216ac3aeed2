"""TIP against the official code: every loss, output, gradient and running statistic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.method import variable_shapes
from mim_jax.methods.tip import TIP
from mim_jax.models.table_encoder import column_codes
from mim_jax.training.tree import flatten
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
)


def sizes(cfg: dict, **changes) -> dict:
    """Fields of the config from the official constructor's arguments."""
    c = cfg["config"]
    bottleneck = cfg.get("hparams", {}).get("model", "resnet50") == "resnet50"
    return {
        "model.encoder": "resnet50" if bottleneck else "resnet18",
        "model.base": c["base"],
        "model.depths": tuple(c["layers"]),
        "model.categories": tuple(c["cat"]),
        "model.continuous": c["con"],
        "model.table_width": c["dim"],
        "model.table_depth": c["tl"],
        "model.fusion_depth": c["ml"],
        "data.image_size": (c["img"], c["img"]),
        "compute_dtype": "float32",
        **changes,
    }


def build(cfg: dict, **changes) -> TIP:
    c = cfg["config"]
    own = {
        "model.projection": c["proj"],
        "model.temperature": c["temp"],
        "model.image_share": c["lambda_0"],
        "model.mask_ratio": c["rr"] + c["rs"],
    }
    return TIP.build(configs.load("tip", {**sizes(cfg), **own, **changes}))


@functools.cache
def read(path) -> Case:
    return Case(path)


def load(method: TIP, case: Case):
    table = method.layout()
    loaded = table.load(case.group("param"), table.joined(variable_shapes(method)))
    return table.parted(loaded)


def batch_of(case: Case) -> dict[str, jax.Array]:
    return {
        "image": jnp.asarray(images_nhwc(case["in/image"])),
        "table": jnp.asarray(case["in/table"]),
        "table_corrupted": jnp.asarray(case["in/table_corrupted"]),
    }


def recorded_noise(case: Case) -> np.ndarray:
    """Noise under which the recorded negatives are drawn."""
    drawn = np.stack([case["draw/neg_tabular_for_image"], case["draw/neg_image_for_tabular"]])
    return 1e6 * (np.arange(drawn.shape[1]) == drawn[..., None])


def step(method: TIP, case: Case):
    """Loss, output, new statistics, metrics and gradient of the recorded step."""
    variables, batch = load(method, case), batch_of(case)
    masked, noise = jnp.asarray(case["in/mask"]), jnp.asarray(recorded_noise(case))

    def loss_of(params):
        output, statistics = method.forward({**variables, "params": params}, batch, masked, noise)
        loss, metrics = method.objective(output, batch, masked)
        return loss, (output, statistics, metrics)

    with jax.default_matmul_precision("highest"):
        (loss, aux), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
            variables["params"]
        )
    return loss, *aux, gradient


@functools.cache
def step_of(path):
    case = read(path)
    method = build(case.cfg)
    return method, step(method, case)


pretraining = pytest.mark.parametrize("path", case_params("tip"))


@pretraining
def test_losses_match(path):
    case = read(path)
    _, (loss, _, _, metrics, _) = step_of(path)
    assert_close(loss, case["out/total_loss"], "total loss")
    for name, key in (
        ("loss_itc", "itc_loss"),
        ("loss_itm", "itm_loss"),
        ("loss_mtr", "mtr_loss"),
        ("loss_mtr_categorical", "mtr_cat"),
        ("loss_mtr_continuous", "mtr_con"),
    ):
        assert_close(metrics[name], case[f"out/{key}"], name)


@pretraining
def test_outputs_match(path):
    case = read(path)
    method, (_, output, _, _, _) = step_of(path)
    pairs = len(case["in/image"])
    maps = case["out/image_feature_map"]
    tokens = maps.reshape(*maps.shape[:2], -1).transpose(0, 2, 1)  # row-major
    assert_close(output.image, tokens, "image map")
    assert method.model.encoder.grid == maps.shape[2:]
    for ours, key in (
        (output.image_projection, "z_image"),
        (output.table_projection, "z_tabular"),
        (output.similarity, "itc_logits"),
        (output.matching, "itm_logits"),
        (output.table, "tabular_corrupted_tokens"),
        (output.masked_table, "tabular_masked_tokens"),
        (output.fused[:pairs], "mm_pos"),
        (output.fused[pairs:], "mm_neg"),
        (output.masked_fused, "mm_masked"),
        (output.weights[0], "weights_i2t"),
        (output.weights[1], "weights_t2i"),
        (output.values, "cat_logits"),
        (output.numbers[..., None], "con_pred"),
        (np.arange(3 * pairs) < pairs, "itm_labels"),
    ):
        assert_close(ours, case[f"out/{key}"], key)
    categories = method.model.table_encoder.categories
    probability = jax.nn.softmax(output.values).reshape(-1, sum(categories))
    assert_close(probability, case["out/prob_cat"], "probabilities")
    codes = column_codes(jnp.asarray(case["in/table"]), categories)
    np.testing.assert_array_equal(np.ravel(codes), case["out/target_cat"])
    masked = case["in/mask"][:, : len(categories)]
    np.testing.assert_array_equal(masked.ravel(), case["out/mask_cat"])
    assert case["in/mask"].sum(axis=1).tolist() == [method.masked] * pairs


@pretraining
def test_running_statistics_after_the_step_match(path):
    case = read(path)
    method, (_, _, statistics, _, _) = step_of(path)
    saved = method.layout().save({**load(method, case)["params"], **statistics})
    golden = case.group("out/after")
    assert len(golden) == len(flatten(statistics))
    for key, value in golden.items():
        assert_close(saved[key], value, key)


@pretraining
@pytest.mark.parametrize("changes", [{}, {"model.scan": True, "model.remat": "full"}])
def test_all_gradients_match(path, changes):
    case = read(path)
    if changes:
        method = build(case.cfg, **changes)
        gradient = step(method, case)[-1]
    else:
        method, (*_, gradient) = step_of(path)
    statistics = {k: v for k, v in load(method, case).items() if k != "params"}
    ours = method.layout().save({**jax.device_get(gradient), **statistics})
    golden = case.group("grad")
    assert set(golden) == {k for k in ours if "running_" not in k and "num_batches" not in k}
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key, relative=5e-4)


@pretraining
@pytest.mark.parametrize("changes", [{}, {"model.scan": True}])
def test_official_checkpoint_round_trip_is_exact(path, changes):
    case = read(path)
    method = build(case.cfg, **changes)
    variables = load(method, case)
    saved = method.layout().save(method.layout().joined(variables))
    official = case.group("param")
    assert set(saved) == set(official)
    for key, value in official.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)
        assert saved[key].dtype == value.dtype, key


@pretraining
def test_sizes_are_read_off_the_file(path):
    case = read(path)
    method = build(case.cfg)
    other = build(
        case.cfg,
        **{"model.base": 2, "model.table_depth": 1, "model.projection": 3, "model.depths": (1,)},
    )
    found = other.sized_like(case.group("param"), {})
    assert found.model == method.model
