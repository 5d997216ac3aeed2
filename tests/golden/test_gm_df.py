"""GM-DF against an independent PyTorch code: every output, gradient and meta-gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.masking import random_masking
from mim_jax.methods.gm_df import GMDF, UNSEEN, Aligned
from mim_jax.models.adapted_clip import is_expert
from mim_jax.training.tree import flatten
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
)

MODELS = [*case_params("gm_df", "model_sum"), *case_params("gm_df", "model_delta")]
models = pytest.mark.parametrize("path", MODELS)
meta_steps = pytest.mark.parametrize("path", case_params("gm_df", "meta"))
both = pytest.mark.parametrize("path", [*MODELS, *case_params("gm_df", "meta")])


def build(cfg: dict, **changes) -> GMDF:
    """The method of a case's own sizes and weights."""
    ids = cfg["token_ids"]
    fields = {
        "model.clip.width": cfg["width"],
        "model.clip.depth": cfg["layers"],
        "model.clip.heads": cfg["heads"],
        "model.clip.outputs": cfg["embed"],
        "model.clip.patch_size": (cfg["patch"], cfg["patch"]),
        "model.clip.image_size": (cfg["img"], cfg["img"]),
        "model.text.vocabulary": cfg["vocab"],
        "model.text.length": cfg["context"],
        "model.text.width": cfg["t_width"],
        "model.text.depth": cfg["t_layers"],
        "model.text.heads": cfg["t_heads"],
        "model.domains": cfg["domains"],
        "model.domain_width": cfg["dom_dim"],
        "model.experts": cfg["experts"],
        "model.expert_hidden": cfg["expert_hidden"],
        "model.norm_mode": cfg["dnorm_on"],
        "model.second_order_layers": tuple(cfg["so_layers"]),
        "model.prompt_before": (ids["sos"], ids["a"]),
        "model.prompt_after": (*ids["tail"], ids["eot"]),
        "model.temperature": (cfg["tau_base"], cfg["tau_phi"]),
        "model.mask_ratio": cfg["mask_ratio"],
        "model.decoder_width": cfg["dec_width"],
        "model.decoder_depth": cfg["dec_layers"],
        "model.decoder_heads": cfg["dec_heads"],
        "model.mask_weight": cfg["lam_mim"],
        "model.text_weight": cfg["lam_sis"],
        "model.alignment_weight": cfg["lam_dal"],
        "model.inner_rate": cfg.get("beta", 0.0),
        "data.image_size": (cfg["img"], cfg["img"]),
        "compute_dtype": "float32",
    }
    return GMDF.build(configs.load("gm_df", {**fields, **changes}))


@functools.cache
def read(path) -> Case:
    return Case(path)


def batch_of(case: Case, part: str = "") -> dict:
    return {
        "image": jnp.asarray(images_nhwc(case[f"in/{part}images"])),
        "domain": jnp.asarray(case[f"in/{part}domain"], jnp.int32),
        "label": jnp.asarray(case[f"in/{part}labels"], jnp.int32),
    }


def load(method: GMDF, case: Case) -> dict:
    size = (1, *method.vit.image_size, 3)
    like = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": jnp.zeros(size)}))
    return method.layout().load(case.group("param"), like["params"])


def assert_terms(terms: dict, total, case: Case, prefix: str) -> None:
    assert_close(total, case[f"{prefix}loss"], "loss")
    for name in ("l_cls", "l_sis", "l_mim", "l_dal"):
        assert_close(terms[name], case[f"{prefix}{name}"], name)


@models
@pytest.mark.parametrize("remat", ["none", "full"])
def test_losses_and_the_gradient_of_every_parameter_match(path, remat):
    case = read(path)
    method = build(case.cfg, **{"model.remat": remat})
    params, batch = load(method, case), batch_of(case)
    features = jnp.asarray(case["in/align_features"])
    train = Aligned(features, jnp.zeros(len(features), jnp.int32))

    @jax.jit
    def gradient_of(params):
        def loss(params):
            return method.objective({"params": params}, batch, case["draw/noise"], train)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (total, terms), gradient = gradient_of(params)
    assert_terms(terms, total, case, "out/")
    ours, golden = method.layout().save(jax.device_get(gradient)), case.group("grad")
    assert set(golden) == set(ours) - set(case.cfg["no_grad"])
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key)
    for key in case.cfg["no_grad"]:
        assert not np.any(ours[key]), key


@models
def test_what_every_part_gives_matches(path):
    case = read(path)
    method = build(case.cfg)
    variables, batch = {"params": load(method, case)}, batch_of(case)
    mask = random_masking(jnp.asarray(case["draw/noise"]), method.kept).mask
    np.testing.assert_array_equal(mask == 1, case["out/mask"])

    @jax.jit
    def everything(variables):
        found = method.detect(variables, batch)
        return {
            "found": found,
            "texts": method.read(variables),
            "tau": method.temperatures(variables),
            "sim": method.similarities(variables, found.feature, batch["domain"]),
            "mim_pred": method.reconstruct(variables, batch, mask),
            "plain": method.tower.apply({"params": variables["params"]["visual"]}, batch["image"])[
                3
            ],
            "scores": method.scores(variables, batch),
        }

    ours = everything(variables)
    found = ours["found"]
    assert_close(found.seen.tokens, case["out/tokens"], "tokens")
    assert_close(found.class_token, case["out/z_cls"], "z_cls")
    assert_close(found.feature, case["out/v"], "v")
    assert_close(found.logit, case["out/logit"], "logit")
    for layer, feature in zip(case.cfg["so_layers"], found.seen.second_order, strict=True):
        assert_close(feature, case[f"out/second_order.{layer}"], f"second order of {layer}")
    assert len(found.seen.routes) == case.cfg["layers"]
    for i, route in enumerate(found.seen.routes):
        assert_close(route, case[f"out/route.{i}"], f"attention over experts in {i}")
    rows = case["in/domain"]
    assert_close(ours["texts"][rows], case["out/text"], "text")
    wildcard = ours["texts"][method.model.row(jnp.full(len(rows), UNSEEN))]
    assert_close(wildcard, case["out/text_wildcard"], "wildcard text")
    assert_close(ours["tau"][rows], case["out/tau"], "tau")
    assert_close(ours["sim"], case["out/sim"], "similarities")
    assert_close(ours["mim_pred"], case["out/mim_pred"], "reconstruction")
    assert_close(ours["plain"], case["out/clip_plain_image"], "CLIP's image feature")
    assert_close(ours["scores"], 1 / (1 + np.exp(-case["out/logit"])), "scores")


@meta_steps
@pytest.mark.parametrize("order", ["first", "second"])
def test_meta_step_and_all_meta_gradients_match(path, order):
    case = read(path)
    method = build(case.cfg, **{"model.meta": order})
    params = load(method, case)
    train, test = batch_of(case, "train."), batch_of(case, "test.")

    @jax.jit
    def step(params):
        def loss(params):
            fast, inner, aligned = method.inner_step({"params": params}, train)
            noise = case["draw/test.noise"]
            total, terms = method.objective(fast, test, noise, aligned)
            return total, (terms, fast["params"], inner, aligned)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (total, (terms, fast, inner, aligned)), gradient = step(params)
    assert_close(inner, case["out/inner_l_cls"], "inner loss")
    assert_close(aligned.features, case["out/align_features"], "features to align with")
    table = method.layout()
    before, after = (table.save(jax.device_get(x)) for x in (params, fast))
    experts = {rule.key for rule in table.rules if is_expert(rule.path)}
    golden = {key.removeprefix("out/fast."): key for key in case.arrays if "out/fast." in key}
    assert experts == set(golden)
    for key, name in golden.items():
        assert_close(after[key], case[name], f"fast {key}")
        inner_gradient = (before[key] - after[key]) / case.cfg["beta"]
        wanted = case[f"out/inner_grad.{key}"]
        # Taken from a difference, so with the rounding of the parameter itself.
        rounding = 1e-6 * np.abs(before[key]).max() / case.cfg["beta"]
        np.testing.assert_allclose(inner_gradient, wanted, rtol=1e-3, atol=rounding, err_msg=key)
    for key in set(before) - experts:
        np.testing.assert_array_equal(after[key], before[key], err_msg=key)
    assert_terms(terms, total, case, "out/outer_")
    ours = table.save(jax.device_get(gradient))
    golden = {
        key.removeprefix(f"{order}."): value
        for key, value in case.group("grad").items()
        if key.startswith(f"{order}.")
    }
    assert {key for key in ours if not key.startswith("clip.")} == set(golden)
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key, relative=1e-3)


@meta_steps
def test_a_training_step_is_the_meta_step_of_its_blocks(path):
    case = read(path)
    method = build(case.cfg)
    params = load(method, case)
    train, test = batch_of(case, "train."), batch_of(case, "test.")
    batch = {name: jnp.concatenate([train[name], test[name]]) for name in train}
    rngs = {"mask": jax.random.key(0)}
    _, aux = jax.jit(method.loss)({"params": params}, batch, rngs, 0)
    assert_close(aux.metrics["l_cls_meta_train"], case["out/inner_l_cls"], "inner loss")
    for name in ("l_cls", "l_sis", "l_dal"):  # the mask is a fresh one
        assert_close(aux.metrics[name], case[f"out/outer_{name}"], name)


@both
def test_checkpoint_round_trip_is_exact(path):
    case = read(path)
    method = build(case.cfg)
    params, official = load(method, case), case.group("param")
    saved = method.layout().save(params)
    assert set(saved) == set(official)
    for key, value in official.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)
    again = flatten(method.layout().load(saved, params))
    for key, value in flatten(params).items():
        np.testing.assert_array_equal(again[key], value)
