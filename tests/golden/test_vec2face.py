"""Vec2Face against the official code: images, losses, gradients of both networks, AttrOP."""

import ast
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.generation.attribute_search import AttributeSearch, quality
from mim_jax.generation.identities import ordered_noise, perturbed
from mim_jax.layout.vec2face import iresnet_layout, lpips_layout
from mim_jax.losses import structural_similarity
from mim_jax.masking import MaskRate, rounded_up
from mim_jax.method import parameter_shapes
from mim_jax.methods.vec2face import Vec2Face
from mim_jax.models.iresnet import IResNet, iresnet_blocks
from mim_jax.models.lpips import LPIPS
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
)
from tests.golden.formula_weights import formula_weights

THROUGH_FROZEN = 5e-4
"""Relative error of gradients that pass face model and LPIPS, as the golden files ask."""

OF_STEM = 5e-3
"""The same of the discriminator's first convolutions: a sum that lies within rounding errors of the
leaky ReLU's kink takes either slope. In float64 we get what we get in float32."""


@functools.cache
def read(path) -> Case:
    return Case(path)


def build(cfg: dict, **changes) -> Vec2Face:
    d = cfg["ddconfig"]
    fields = {
        "model.size": "",
        "model.width": cfg["D"],
        "model.depth": cfg["depth"],
        "model.heads": cfg["heads"],
        "model.decoder_depth": cfg["ddepth"],
        "model.decoder_heads": cfg["dheads"],
        "model.mask_rate": (cfg["rmin"], cfg.get("rmax", 1.0), cfg["rmu"], cfg.get("rstd", 0.25)),
        "model.image_decoder_inputs": d["z_channels"],
        "model.image_decoder_widths": tuple(d["ch"] * m for m in d["ch_mult"]),
        "model.image_decoder_blocks": d["num_res_blocks"],
        "model.image_decoder_groups": 32,
        "model.official_shortcut": True,
        "model.discriminator_widths": tuple(cfg["disc_dims"]),
        "model.discriminator_groups": cfg.get("disc_groups", 8),
        "model.discriminator_start": cfg.get("disc_start", 0),
        "model.face_model.size": "iresnet18",
        "model.face_model.outputs": cfg["rep"],
        "data.image_size": (d["resolution"],) * 2,
        "data.channels": d["out_ch"],
        "compute_dtype": "float32",
    }
    return Vec2Face.build(configs.load("vec2face:base", {**fields, **changes}))


def of_formula(layout, like):
    """Our parameters of a frozen network with the golden formula's weights."""
    flat = {rule.key: rule for rule in layout.rules}
    shapes = {}
    for key, rule in flat.items():
        leaf = functools.reduce(lambda tree, name: tree[name], rule.path.split("/"), like)
        shapes[key] = rule.transform.save(np.empty(leaf.shape, np.bool_)).shape
    constants = {table.key: table.value for table in layout.constants}
    shapes |= {key: value.shape for key, value in constants.items()}
    return layout.load(formula_weights(shapes, constants), like)


def official(case: Case) -> dict[str, np.ndarray]:
    parts = {"vec2face": "model_vec2face.", "disc": "model_disc."}
    return {
        start + key: value
        for part, start in parts.items()
        for key, value in case.group(f"param/{part}").items()
    }


def load(method: Vec2Face, case: Case):
    like = parameter_shapes(method)
    params = method.layout().load(official(case), like)
    face_layout = iresnet_layout(method.face_model)
    params["face_model"] = of_formula(face_layout, like["face_model"])
    if method.perceptual is not None:
        params["perceptual"] = of_formula(lpips_layout(method.perceptual), like["perceptual"])
    return params


def masking_of(method: Vec2Face, noise, share):
    return method.masks_of_share(method.mask_rate, noise, share)


def seen(path, **changes):
    """Losses, outputs and gradients of one case, computed once for each setting."""
    return _seen(path, tuple(sorted(changes.items())))


@functools.cache
def _seen(path, changes):
    case = read(path)
    method = build(case.cfg, **dict(changes))
    params = load(method, case)
    masking = masking_of(method, jnp.asarray(case["draw/noise"]), float(case["draw/mask_rate"]))
    images, golden = (jnp.asarray(images_nhwc(case[x])) for x in ("in/gt_img", "out/image"))

    @jax.jit
    def run(params, vectors, step):
        frozen = {k: v for k, v in params.items() if k in ("face_model", "perceptual")}

        def loss(trained, vectors):
            variables = {"params": {**trained, **frozen}}
            output = method.forward(variables, vectors, masking)
            # The slope of a PReLU in the face model jumps at zero: an image that is off by rounding
            # errors moves the gradient by 1e-3. So the losses see the golden image itself, which
            # the generator's own is compared with.
            same = golden + (output.image - jax.lax.stop_gradient(output.image))
            ae_loss, d_loss, metrics = method.objective(
                variables, images, vectors, output._replace(image=same), step
            )
            fake, real = (
                method.discriminator.apply({"params": trained["discriminator"]}, x)
                for x in (output.image, images)
            )
            feature = method.face_features(variables, output.image)
            return ae_loss + d_loss, (output, metrics, fake, real, feature)

        trained = {k: v for k, v in params.items() if k not in frozen}
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(trained, vectors)

    (_, outputs), gradients = run(params, jnp.asarray(case["in/rep"]), case.cfg["epoch"])
    return method, masking, jax.device_get(outputs), jax.device_get(gradients)


def norm(tree) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree))))


generation = pytest.mark.parametrize("path", case_params("vec2face"))


@generation
def test_masks_match(path):
    case = read(path)
    method, masking, _, _ = seen(path)
    np.testing.assert_array_equal(masking.mask, case["out/mask_all"][:, 1:])
    dropped = case["out/mask_drop"][:, 1:]
    assert masking.keep_ids.shape[1] == method.tokens - dropped[0].sum()
    np.testing.assert_array_equal(np.take_along_axis(dropped, masking.keep_ids, 1), 0)


@generation
def test_every_output_of_the_generator_matches(path):
    case = read(path)
    _, _, (output, _, fake, real, feature), _ = seen(path)
    assert_close(output.tokens.target, case["out/token_target"], "target")
    assert_close(output.tokens.latent, case["out/encoder_latent"], "latent")
    assert_close(output.tokens.logits, case["out/logits"], "logits")
    assert_close(output.projected, images_nhwc(case["out/decoder_proj"]), "projection")
    assert_close(output.image, images_nhwc(case["out/image"]), "image")
    # Of the last convolutions, relative to the largest value: each sums up many.
    assert_gradient_close(fake, images_nhwc(case["out/disc_logits_fake"]), "fake")
    assert_gradient_close(real, images_nhwc(case["out/disc_logits_real"]), "real")
    assert_gradient_close(feature, case["out/gen_feature"], "feature")


@generation
def test_every_loss_matches(path):
    case = read(path)
    _, _, (_, metrics, *_), _ = seen(path)
    names = {"p_loss": "p_loss_times2"}
    for name in ("rec_loss", "ssim_loss", "token_loss", "feature_loss", "p_loss", "g_loss"):
        assert_close(metrics[name], case[f"out/{names.get(name, name)}"], name)
    assert_close(metrics["ae_loss"], case["out/ae_loss"], "loss of the generator")
    assert_close(metrics["d_loss"], case["out/d_loss"], "loss of the discriminator")
    assert metrics["d_weight"] == 1


@generation
def test_all_gradients_of_both_networks_match(path):
    case = read(path)
    method, _, _, (gradient, to_vector) = seen(path)
    ours = method.layout().save(gradient)
    unused = {k for k in ours if "patch_embed" in k or "center_token" in k}
    assert norm([ours.pop(key) for key in unused]) == 0
    golden = {f"model_vec2face.{k}": v for k, v in case.group("grad/ae_loss/vec2face").items()}
    golden |= {f"model_disc.{k}": v for k, v in case.group("grad/d_loss/disc").items()}
    assert set(golden) == set(ours) - {"model_vec2face.token_emb.position_ids"}
    largest = max(np.abs(value).max() for value in golden.values())
    for key, value in golden.items():
        if np.abs(value).max() < 1e-6 * largest:
            # Nothing but rounding errors: a norm takes out what such a bias adds.
            assert np.abs(ours[key]).max() < 1e-5 * largest, key
        else:
            relative = OF_STEM if "model_disc.layers.0." in key else THROUGH_FROZEN
            assert_gradient_close(ours[key], value, key, relative)
    assert_gradient_close(to_vector, case["grad/ae_loss/in_rep"], "vector", THROUGH_FROZEN)


@generation
def test_official_leak_adds_the_generators_gradient_to_the_discriminator(path):
    case = read(path)
    _, _, _, (sane, _) = seen(path)
    _, _, _, (leaky, _) = seen(path, **{"model.leak_generator_gradient": True})
    extra = jax.tree.map(np.subtract, leaky["discriminator"], sane["discriminator"])
    golden = case["out/norm_of_disc_grad_from_ae_loss"]
    assert_close(np.float32(norm(extra)), golden, "norm", THROUGH_FROZEN)
    for a, b in zip(jax.tree.leaves(leaky["generator"]), jax.tree.leaves(sane["generator"])):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@generation
def test_weights_of_the_published_time_match(path):
    case = read(path)
    published = {"perceptual": 1.0, "structure": 1.0, "adversarial": 0.8, "adaptive": True}
    changes = {f"model.loss_weights.{name}": value for name, value in published.items()}
    _, _, (_, metrics, *_), (gradient, _) = seen(path, **changes)
    assert_close(metrics["nll"], case["out/nll_2024_weights"], "nll")
    golden = case["out/adaptive_weight_2024"]
    assert_close(metrics["d_weight"], golden, "adaptive weight", THROUGH_FROZEN)
    _, _, _, (plain, _) = seen(path)
    # The weight is a constant to the discriminator.
    for a, b in zip(
        jax.tree.leaves(gradient["discriminator"]), jax.tree.leaves(plain["discriminator"])
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@generation
def test_official_checkpoint_round_trip_is_exact(path):
    case = read(path)
    method = build(case.cfg)
    like = parameter_shapes(method)
    given = official(case)
    saved = method.layout().save(method.layout().load(given, like))
    assert set(saved) == set(given)
    for key, value in given.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)
        assert saved[key].dtype == value.dtype, key


@generation
def test_sizes_are_read_off_an_official_checkpoint(path):
    case = read(path)
    known = {"heads": case.cfg["heads"], "decoder_heads": case.cfg["dheads"]}
    method = build(case.cfg)
    template = Vec2Face.build(configs.load("vec2face:base", {"compute_dtype": "float32"}))
    sized = template.sized_like(official(case), known)
    # Neither groups nor the face model's depth show in the file.
    assert sized.generator.tokens == method.generator.tokens
    assert sized.generator.image_decoder == method.generator.image_decoder
    assert sized.discriminator.widths == method.discriminator.widths
    assert sized.face_model.outputs == method.face_model.outputs


@pytest.mark.parametrize("path", case_params("vec2face", "attrop"))
def test_attribute_search_matches_step_by_step(path):
    case = read(path)
    cfg = case.cfg
    with jax.enable_x64(True):
        changes = {"compute_dtype": "float64", "model.loss_weights.perceptual": 0.0}
        method = build(cfg, **changes, **{"model.loss_weights.adversarial": 0.0})
        params = method.layout().load(official(case), parameter_shapes(method))
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        noise, shares = (jnp.asarray(case[f"draw/{name}"]) for name in ("noise", "mask_rate"))

        def generate(vectors, call):
            masking = masking_of(method, noise[call], shares[call])
            return jnp.clip(method.forward({"params": params}, vectors, masking).image, -1, 1)

        def linear(name):
            weight, bias = (jnp.asarray(case[f"in/{name}_{x}"], jnp.float64) for x in "Wb")

            def net(images):
                rows, columns = (side // 14 for side in images.shape[1:3])
                cells = images.reshape(len(images), rows, 14, columns, 14, -1).mean((2, 4))
                return cells.transpose(0, 3, 1, 2).reshape(len(images), -1) @ weight.T + bias

            return net

        search = AttributeSearch(
            generate,
            linear("fr"),
            (quality(linear("q"), cfg["q_target"], cfg["q_limit"]),),
            counted_steps=cfg["num_iter"],
            identity_limit=cfg["id_limit"],
        )
        identity = jnp.asarray(case["in/class_rep"], jnp.float64)
        start = jnp.asarray(case["in/rep"], jnp.float64)
        found, images, end = jax.jit(search.run)(start, identity)
        assert int(end.steps) == case["out/n_steps"]
        np.testing.assert_allclose(found, case["out/new_rep"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(images, images_nhwc(case["out/image"]), rtol=1e-4, atol=1e-5)
        state, step = search.start(start), jax.jit(search.step)
        for i in range(int(case["out/n_steps"])):
            state = step(state, identity)
            gradient = case["out/rep_grad"][i]
            assert_gradient_close(state.gradient, gradient, f"gradient {i}", 1e-5)
            expected = case["out/rep_trajectory"][i]
            np.testing.assert_allclose(state.vectors, expected, rtol=1e-5, atol=1e-6)
            for name, value in (
                ("id_loss", state.terms.identity),
                ("q_loss", state.terms.attributes[0]),
                ("total_loss", state.terms.total),
            ):
                np.testing.assert_allclose(value, case[f"out/{name}"][i], rtol=1e-5, atol=1e-6)


networks = pytest.mark.parametrize("path", case_params("vec2face", "nets"))


def shapes_in(case: Case, name: str) -> dict[str, tuple[int, ...]]:
    shapes = (ast.literal_eval(str(shape)) for shape in case[f"{name}_shapes"])
    return dict(zip(map(str, case[f"{name}_keys"]), shapes))


def channel_means(x):
    return np.asarray(x).mean(axis=(1, 2))


@networks
def test_face_model_matches_stage_by_stage(path):
    case = read(path)
    shapes = shapes_in(case, "iresnet")
    images = jnp.asarray(images_nhwc(case["in/x"]))
    model = IResNet(
        images.shape[1:3],
        images.shape[-1],
        iresnet_blocks(f"iresnet{case.cfg['iresnet']}"),
        outputs=shapes["fc.weight"][0],
    )
    state = formula_weights(shapes)
    first = [state[key].reshape(-1)[0] for key in sorted(shapes)]
    np.testing.assert_allclose(first, case["out/iresnet_first_values"], rtol=1e-6)
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    layout = iresnet_layout(model)
    variables = layout.load(state, like)
    features, seen = jax.jit(
        lambda v, x: model.apply(v, x, mutable="intermediates", capture_intermediates=True)
    )(variables, images)
    maps = {
        name: value["__call__"][0]
        for name, value in seen["intermediates"].items()
        if name != "__call__"
    }
    outputs = {"stem": maps["stem_prelu"]}
    for stage, depth in enumerate(model.blocks, 1):
        outputs[f"layer{stage}_channel"] = maps[f"stage{stage}_blocks_{depth - 1}"]
    for name, value in outputs.items():
        golden = case[f"out/iresnet_{name}_mean"]
        assert_gradient_close(channel_means(value), golden, name)
    assert_gradient_close(features, case["out/iresnet_features"], "features")
    saved = layout.save(variables)
    assert set(saved) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)
        assert saved[key].dtype == value.dtype, key


@networks
def test_lpips_matches_slice_by_slice(path):
    case = read(path)
    model, shapes = LPIPS(), shapes_in(case, "lpips")
    layout = lpips_layout(model)
    state = formula_weights(shapes, {table.key: table.value for table in layout.constants})
    first = [state[key].reshape(-1)[0] for key in sorted(shapes)]
    np.testing.assert_allclose(first, case["out/lpips_first_values"], rtol=1e-6)
    x, y = (jnp.asarray(images_nhwc(case[f"in/{name}"])) for name in "xy")
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), x, y))["params"]
    params = layout.load(state, like)
    distance, seen = jax.jit(
        lambda p: model.apply(
            {"params": p}, x, y, mutable="intermediates", capture_intermediates=True
        )
    )(params)
    for i, widths in enumerate(model.slices):
        convolved = seen["intermediates"][f"conv{i}_{len(widths) - 1}"]["__call__"][0][: len(x)]
        golden = case[f"out/vgg_slice{i + 1}_channel_mean"]
        assert_gradient_close(channel_means(jax.nn.relu(convolved)), golden, f"slice {i + 1}")
    assert_close(distance.reshape(-1, 1, 1, 1), case["out/lpips"], "distance")
    saved = layout.save(params)
    assert set(saved) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(saved[key], value, err_msg=key)


@networks
def test_structural_similarity_matches(path):
    case = read(path)
    x, y = ((images_nhwc(case[f"in/{name}"]) + 1) / 2 for name in "xy")
    assert_close(structural_similarity(jnp.asarray(x), jnp.asarray(y)), case["out/ssim"], "ssim")


@pytest.mark.parametrize("path", case_params("vec2face", "perturb"))
def test_perturbed_vectors_match(path):
    case = read(path)
    groups = [case[f"draw/normal_{i}"] for i in range(len(case.cfg["epsilons"]))]
    normal = jnp.asarray(np.concatenate(groups), jnp.float32)
    order = jnp.asarray(case["draw/permutation"])
    noise = ordered_noise(normal, case.cfg["epsilons"], case.cfg["percentages"], order)
    base = case["in/base"]
    ours = np.asarray(perturbed(jnp.asarray(base), noise))
    assert_close(ours, case["out/samples"], "samples")
    cosine = (ours * base).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(base, axis=1)
    assert_close(cosine, case["out/cosine_to_base"], "cosine")


@pytest.mark.parametrize("path", case_params("vec2face", "maskrate"))
def test_mask_rates_match(path):
    case = read(path)
    tokens = case.cfg.get("tokens", 49)
    uniform = jnp.asarray(case["in/u"], jnp.float32)
    for i, setting in enumerate(case.cfg["settings"]):
        rate = MaskRate(setting["min"], setting["max"], setting["mu"], setting["std"])
        shares = rate.draw(uniform)
        assert_close(shares, case[f"out/quantiles_{i}"], "quantiles")
        np.testing.assert_array_equal(rounded_up(shares, tokens), case[f"out/num_masked_{i}"])
        assert rate.smallest(tokens) == case[f"out/num_dropped_{i}"]
        many = rate.draw((jnp.arange(20000) + 0.5) / 20000)
        assert abs(float(many.mean()) - case[f"out/mean_{i}"]) < 1e-3
