"""ConvMAE and FastConvMAE against the official code, and MR-MAE against a write-up of its paper."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.methods.mr_mae import MRMAE
from mim_jax.models.conv_vit import VisibleCells
from mim_jax.models.tower import tower_settings
from mim_jax.training.tree import flatten
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
    mask_major,
)
from tests.golden.test_mae import pair

CLIP_CASES = [*case_params("mr_mae"), *case_params("mr_mae", "mrmcmae")]
CONVMAE_CASES, FAST_CASES = case_params("mr_mae", "convmae"), case_params("mr_mae", "fastconvmae")
CONV_CASES = [*CONVMAE_CASES, *FAST_CASES]

REMOVED = [
    *(
        pytest.param(*case.values, "zeroed", id=f"{case.id}-zeroed", marks=case.marks)
        for case in CONVMAE_CASES
    ),
    *(
        pytest.param(*case.values, "skipped", id=f"{case.id}-skipped", marks=case.marks)
        for case in CONV_CASES
    ),
]
"""Cases with what the stages do with removed patches; FastConvMAE computes each patch once."""

ACTIVATIONS = {
    "patch_embed1": "stage1_embed",
    "patch_embed2": "stage2_embed",
    "patch_embed3": "stage3_embed",
    "patch_embed4": "token_embed",
    "stage1_output_decode": "stage1_fusion",
    "stage2_output_decode": "stage2_fusion",
    "norm": "norm",
    "decoder_embed": "embed",
}
"""Official modules by name, and ours."""


def build(cfg: dict, changes: dict | None = None) -> MRMAE:
    """The method from the official constructor's arguments."""
    c = cfg["constructor"]
    hybrid = isinstance(c["embed_dim"], list)
    fields = {
        "model.size": "",
        "model.heads": c["num_heads"],
        "model.decoder_width": c["decoder_embed_dim"],
        "model.decoder_depth": c["decoder_depth"],
        "model.decoder_heads": c["decoder_num_heads"],
        "model.normalize_target": c["norm_pix_loss"],
        "model.mask_ratio": cfg["mask_ratio"],
        "data.channels": c.get("in_chans", 3),
        "compute_dtype": "float32",
    }
    if hybrid:
        *conv_ratios, ratio = c["mlp_ratio"]
        fields |= {
            "model.widths": tuple(c["embed_dim"]),
            "model.depths": tuple(c["depth"]),
            "model.patch_sizes": tuple(c["patch_size"]),
            "model.conv_mlp_ratios": tuple(map(float, conv_ratios)),
            "model.mlp_ratio": float(ratio),
            "data.image_size": pair(c["img_size"][0]),
        }
    else:
        fields |= {
            "model.width": c["embed_dim"],
            "model.depth": c["depth"],
            "model.patch_size": pair(c["patch_size"]),
            "model.mlp_ratio": float(c["mlp_ratio"]),
            "data.image_size": pair(c["img_size"]),
        }
    if "views" in cfg:
        fields["model.views"] = cfg["views"]
    if "teacher" in cfg:
        fields |= {"model.mimic_weight": cfg["mimic_weight"], **teacher_fields(cfg["teacher"])}
    else:
        fields["model.mimic_weight"] = 0.0
    variant = "mcmae_b16" if hybrid else "vit_b16"
    return MRMAE.build(configs.load(f"mr_mae:{variant}", {**fields, **(changes or {})}))


def teacher_fields(t: dict) -> dict:
    family = {"quick_gelu": "clip", "gelu": "openclip"}[t["hidden_act"]]
    settings = tower_settings(
        "clip_b16",
        family=family,
        size="tiny",
        width=t["hidden_size"],
        depth=t["num_hidden_layers"],
        heads=t["num_attention_heads"],
        mlp_ratio=t["intermediate_size"] / t["hidden_size"],
        patch_size=t["patch_size"],
        image_size=t["image_size"],
        outputs=0,
        epsilon=t["layer_norm_eps"],
    )
    return {f"model.teacher.{field}": value for field, value in settings.items()}


@functools.cache
def read(path) -> Case:
    return Case(path)


def load(method: MRMAE, case: Case):
    images = jnp.asarray(images_nhwc(case["in/imgs"]))
    like = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": images}))["params"]
    return images, method.layout().load(case.group("param"), like)


def objective(params, method: MRMAE, images, draw):
    """The loss, and all that leads to it, for the case's own draws."""
    seen = method.seen({"params": params}, images)
    chosen = method.random(draw) if method.mask_type == "random" else method.focused(draw, seen)
    output = method.predict({"params": params}, images, chosen)
    loss, terms = method.objective(output, images, seen, chosen)
    return loss, (terms, output, chosen, seen)


@functools.cache
def computed(path, **changes):
    case = read(path)
    method = build(case.cfg, {f"model.{name}": value for name, value in changes.items()})
    images, params = load(method, case)
    value = jax.value_and_grad(objective, has_aux=True)
    (loss, rest), gradient = jax.jit(value, static_argnums=1)(
        params, method, images, jnp.asarray(case["draw/noise"])
    )
    return method, params, loss, rest, jax.device_get(gradient)


def check_gradients(method: MRMAE, gradient, case: Case) -> None:
    ours = method.layout().save(gradient)
    golden = case.group("grad")
    trained = {k for k in ours if "pos_embed" not in k and not k.startswith("teacher.")}
    assert set(golden) == trained
    for key, value in golden.items():
        assert_gradient_close(ours[key], value, key)
    for path, leaf in flatten(gradient).items():
        assert not path.startswith("teacher/") or not np.any(leaf), path


@pytest.mark.parametrize("path", CLIP_CASES)
def test_losses_predictions_targets_and_all_gradients_of_mr_mae_match(path):
    case = read(path)
    method, _, loss, (terms, output, chosen, seen), gradient = computed(path)
    assert_close(loss, case["out/loss"], "loss")
    assert_close(terms["loss_rec"], case["out/loss_rec"], "loss_rec")
    assert_close(terms["loss_mimic"], case["out/loss_mimic"], "loss_mimic")
    assert_close(output.latent, case["out/latent"], "latent")
    assert_close(output.pred, case["out/pred"], "pred")
    assert_close(output.mimic, case["out/mimic_student"], "mimic_student")
    assert_close(chosen.mask, case["out/mask"], "mask")
    np.testing.assert_array_equal(chosen.keep_ids, case["out/ids_keep"])
    np.testing.assert_array_equal(chosen.restore_ids, case["out/ids_restore"])
    assert_close(seen.patches(seen.blocks[-1]), case["out/teacher_tokens"], "teacher_tokens")
    assert_close(seen.class_attention, case["out/teacher_cls_attention"], "class attention")
    at_visible = functools.partial(np.take_along_axis, indices=case["out/ids_keep"][..., None])
    target = at_visible(np.asarray(method.mimic_target(seen)), axis=1)
    assert_close(target, case["out/mimic_target"], "mimic_target")
    raw = at_visible(np.asarray(seen.patches(seen.blocks[-1])), axis=1)
    assert_close(raw, case["out/mimic_target_raw"], "mimic_target_raw")
    check_gradients(method, gradient, case)


@pytest.mark.parametrize("path", CLIP_CASES)
def test_teacher_sees_images_in_its_own_normalization(path):
    case = read(path)
    method = build(case.cfg)
    images = jnp.asarray(images_nhwc(case["in/imgs"]))
    ours = method.teacher.inputs(images, method.mean, method.std)
    assert_close(ours, images_nhwc(case["out/teacher_input"]), "teacher_input")


@pytest.mark.parametrize("path", CLIP_CASES)
def test_loss_without_normalization_of_the_target_matches(path):
    case = read(path)
    _, _, _, (_, output, chosen, seen), _ = computed(path)
    method = build(case.cfg, {"model.target_norm": "none"})
    images = jnp.asarray(images_nhwc(case["in/imgs"]))
    _, terms = method.objective(output, images, seen, chosen)
    assert_close(terms["loss_mimic"], case["out/loss_mimic_raw_target"], "loss_mimic_raw_target")


@pytest.mark.parametrize("path", CLIP_CASES)
def test_visible_patches_drawn_by_attention_match(path):
    case = read(path)
    method = build(case.cfg, {"model.mask_type": "attention"})
    images, params = load(method, case)
    loss, (terms, _, chosen, _) = jax.jit(objective, static_argnums=1)(
        params, method, images, jnp.asarray(case["draw/exponential"])
    )
    np.testing.assert_array_equal(chosen.keep_ids, case["out/attentive_ids_keep"])
    assert_close(chosen.mask, case["out/attentive_mask"], "mask")
    assert_close(loss, case["out/attentive_loss"], "loss")
    assert_close(terms["loss_rec"], case["out/attentive_loss_rec"], "loss_rec")
    assert_close(terms["loss_mimic"], case["out/attentive_loss_mimic"], "loss_mimic")


@pytest.mark.parametrize(("path", "removed"), REMOVED)
def test_loss_predictions_and_all_gradients_of_convmae_match(path, removed):
    case = read(path)
    method, _, loss, (_, output, chosen, _), gradient = computed(path, removed=removed)
    assert_close(loss, case["out/loss"], "loss")
    official = functools.partial(mask_major, views=method.views)
    assert_close(official(output.latent), case["out/latent"], "latent")
    assert_close(official(output.pred), case["out/pred"], "pred")
    assert_close(official(chosen.mask), case["out/mask"], "mask")
    if "out/ids_keep" in case:
        np.testing.assert_array_equal(chosen.keep_ids, case["out/ids_keep"])
        np.testing.assert_array_equal(chosen.restore_ids, case["out/ids_restore"])
    check_gradients(method, gradient, case)


@pytest.mark.parametrize(("path", "removed"), REMOVED)
def test_every_module_output_of_convmae_matches(path, removed):
    case = read(path)
    method, params, _, (_, _, chosen, _), _ = computed(path, removed=removed)
    images = jnp.asarray(images_nhwc(case["in/imgs"]))

    @jax.jit
    def modules(params):
        return method.model.apply(
            {"params": params}, images, chosen, capture_intermediates=True, mutable="intermediates"
        )[1]["intermediates"]

    ours = {p.removesuffix("/__call__"): v[0] for p, v in by_module(modules(params)).items()}
    keep_ids = mask_major(chosen.keep_ids, method.views)
    cells = VisibleCells.of(jnp.asarray(keep_ids), method.model.encoder.grid)
    for name, golden in case.group("out/act").items():
        value = mask_major(first(ours[our_name(name)]), method.views)
        if golden.ndim == 4:
            golden = images_nhwc(golden)
            if removed == "skipped":  # then there are cells only where a view sees
                golden = np.tile(golden, (method.views, 1, 1, 1))
                golden = np.asarray(cells.pick(jnp.asarray(golden)))
        elif name == "patch_embed4" and removed == "skipped":
            golden = np.take_along_axis(golden, keep_ids[..., None], axis=1)
        assert_close(value.reshape(golden.shape), golden, name)


def by_module(tree, path: str = "") -> dict:
    """Captured outputs by path; a module's own is a tuple."""
    if not isinstance(tree, dict):
        return {path: tree}
    parts = [by_module(below, f"{path}/{name}".strip("/")) for name, below in tree.items()]
    return functools.reduce(dict.__or__, parts, {})


def first(output):
    return output[0] if isinstance(output, tuple) else output


def our_name(name: str) -> str:
    """The path of our module that an official one corresponds to."""
    part, _, index = name.partition(".")
    if part == "decoder_blocks":
        return f"decoder/transformer/blocks_{index}"
    if part == "blocks3":
        return f"encoder/transformer/blocks_{index}"
    if part in ("blocks1", "blocks2"):
        return f"encoder/stage{part[-1]}_blocks_{index}"
    return f"{'decoder' if part == 'decoder_embed' else 'encoder'}/{ACTIVATIONS[part]}"


@pytest.mark.parametrize("path", CONVMAE_CASES)
def test_enlarged_masks_match(path):
    case = read(path)
    method, _, _, (_, _, chosen, _), _ = computed(path, removed="skipped")
    cells = VisibleCells.of(chosen.keep_ids, method.model.encoder.grid)
    sizes = method.model.encoder.patch_sizes
    for stage in (1, 2):
        visible = cells.mask(math.prod(sizes[stage:]), jnp.float32)[..., 0]
        np.testing.assert_array_equal(1 - visible, case[f"out/mask_stage{stage}"])


@pytest.mark.parametrize("path", CLIP_CASES + CONV_CASES)
def test_official_checkpoint_round_trip_is_exact(path):
    case = read(path)
    for scan in (False, True):
        method = build(case.cfg, {"model.scan": scan})
        _, params = load(method, case)
        saved, official = method.layout().save(params), case.group("param")
        assert set(saved) == set(official)
        for key, value in official.items():
            loose = "pos_embed" in key
            np.testing.assert_allclose(saved[key], value, rtol=0, atol=1e-6 if loose else 0)
        again = flatten(method.layout().load(saved, params))
        for key, value in flatten(params).items():
            np.testing.assert_array_equal(again[key], value)


@pytest.mark.parametrize("path", CLIP_CASES + CONV_CASES)
def test_a_model_of_other_sizes_takes_those_of_the_checkpoint(path):
    case = read(path)
    method = build(case.cfg)
    hybrid = isinstance(case.cfg["constructor"]["embed_dim"], list)
    sizes = {"model.depths": (2, 1, 1)} if hybrid else {"model.depth": 1}
    other = build(case.cfg, {**sizes, "model.decoder_depth": 2})
    known = {"heads": method.model.encoder.transformer.heads}
    assert other.sized_like(case.group("param"), known).model == method.model
