import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.initial import read_donor
from mim_jax.masking import gather_tokens, masking_of_order
from mim_jax.method import method_class
from mim_jax.methods.hi_end_mae import HiEndMAE
from mim_jax.models.positions import sincos_positions, sincos_positions_3d
from mim_jax.models.transformer import Transformer, layer_norm
from mim_jax.models.vit import PatchEmbed, resize_patch_kernel, resize_patch_outputs
from mim_jax.targets import patchify, unpatchify
from mim_jax.training.optimizer import is_decayed
from mim_jax.training.tree import flatten, unflatten

SIZE, PATCH, TOKENS, KEPT = (4, 6, 4), (2, 2, 2), 12, 3

SIZES = {
    "model.width": 12,
    "model.depth": 4,
    "model.heads": 2,
    "model.patch_size": PATCH,
    "model.taps": (0, 1, 2),
    "model.decoder_width": 18,
    "model.decoder_depth": 2,
    "model.decoder_heads": 3,
    "data.image_size": SIZE,
    "data.channels": 2,
    "data.mean": (0.0, 0.0),
    "data.std": (1.0, 1.0),
    "compute_dtype": "float32",
}


@functools.cache
def tiny(**changes) -> HiEndMAE:
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return HiEndMAE.build(configs.load("hi_end_mae:tiny", {**SIZES, **fields}))


def volumes(batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(batch, *SIZE, 2)).astype(np.float32)


VOLUMES = volumes()
NOISE = np.random.default_rng(9).uniform(size=(2, TOKENS)).astype(np.float32)


@functools.cache
def variables(**changes):
    method = tiny(**changes)
    params = jax.device_get(jax.jit(lambda: method.init(jax.random.key(0), {"image": VOLUMES}))())
    random = np.random.default_rng(1)
    # None of them zero, so that no mistake can hide behind zeros.
    return jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), params)


@functools.cache
def compiled(**changes):
    return jax.jit(tiny(**changes).reconstruct)


@functools.cache
def gradient():
    method = tiny()

    def loss(params):
        output = method.reconstruct({"params": params}, VOLUMES, NOISE)
        return method.reconstruction_loss(VOLUMES, output)

    return jax.jit(jax.grad(loss))


def loss_of(given, noise=NOISE, method=None, params=None) -> float:
    method = method or tiny()
    output = method.reconstruct(params or variables(), given, noise)
    return float(method.reconstruction_loss(given, output))


def voxel_mask(noise=NOISE) -> np.ndarray:
    """1 where a voxel is masked, `[batch, *SIZE, 1]`."""
    mask = masking_of_order(jnp.argsort(noise, axis=1), KEPT).mask
    return np.asarray(unpatchify(mask[..., None].repeat(8, axis=-1), SIZE, PATCH))


def test_every_token_is_visible_or_masked_once():
    output = compiled()(variables(), VOLUMES, NOISE)
    np.testing.assert_array_equal(np.sort(output.order, axis=1), [np.arange(TOKENS)] * 2)
    assert tiny().model.kept == int(TOKENS * 0.25) == KEPT
    assert output.latent.shape == (2, 1 + KEPT, 12)
    assert output.decoded.pred.shape == (2, 1 + TOKENS, 16)
    assert tiny().target(VOLUMES, output.order).shape == (2, TOKENS - KEPT, 16)


def test_encoder_never_sees_a_masked_voxel():
    other = np.where(voxel_mask() == 1, volumes(seed=5), VOLUMES)
    before, after = (compiled()(variables(), x, NOISE) for x in (VOLUMES, other))
    for ours, theirs in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    method = tiny()
    targets = [np.asarray(method.target(x, before.order)) for x in (VOLUMES, other)]
    assert np.abs(targets[0] - targets[1]).min(axis=-1).max() > 0
    assert loss_of(other) != loss_of(VOLUMES)


def test_no_gradient_flows_through_the_target():
    method = tiny()
    order = jnp.argsort(NOISE, axis=1)
    slope = jax.grad(lambda x: jnp.sum(method.target(x, order) ** 3))(jnp.asarray(VOLUMES))
    np.testing.assert_array_equal(slope, 0)
    output = compiled()(variables(), VOLUMES, NOISE)
    slope = jax.grad(lambda x: method.reconstruction_loss(x, output))(jnp.asarray(VOLUMES))
    np.testing.assert_array_equal(slope, 0)


def test_target_patches_have_mean_zero_and_almost_unit_biased_variance():
    faint = VOLUMES * np.float32(1e-3)
    order = jnp.argsort(NOISE, axis=1)
    target = np.asarray(tiny().target(faint, order), np.float64)
    patches = gather_tokens(patchify(jnp.asarray(faint), PATCH), order[:, KEPT:])
    variance = np.asarray(patches, np.float64).var(axis=-1)
    np.testing.assert_allclose(target.mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(target.var(axis=-1), variance / (variance + 1e-6), rtol=1e-4)
    flat = tiny().target(np.full_like(VOLUMES, 0.3), order)
    np.testing.assert_allclose(flat, 0, atol=1e-3)


def test_permuting_the_noise_permutes_the_mask():
    shuffle = np.random.default_rng(2).permutation(TOKENS)
    before, after = (
        masking_of_order(compiled()(variables(), VOLUMES, noise).order, KEPT).mask
        for noise in (NOISE, NOISE[:, shuffle])
    )
    np.testing.assert_array_equal(after, np.asarray(before)[:, shuffle])


def test_gradient_reaches_every_level():
    slopes = flatten(gradient()(variables()["params"]))
    for name in ("embed", *(f"embed_level_{i}" for i in range(3))):
        assert np.abs(slopes[f"decoder/{name}/kernel"]).max() > 1e-6, name


def test_the_last_cross_block_attends_to_the_shallowest_level():
    params = flatten(variables()["params"])
    name = "decoder/cross_blocks_2/cross_attention/key_value/kernel"
    slopes = flatten(gradient()(unflatten({**params, name: np.zeros_like(params[name])})))
    np.testing.assert_array_equal(slopes["decoder/embed_level_0/kernel"], 0)
    for i in (1, 2):
        assert np.abs(slopes[f"decoder/embed_level_{i}/kernel"]).max() > 1e-6


def without_cross_attention(params: dict) -> dict:
    """Parameters of a plain decoder: cross blocks as blocks, without what attends to levels."""
    plain = {}
    for name, value in flatten(params).items():
        if "embed_level" in name or "cross_attention" in name:
            continue
        part, block, rest = name.partition("cross_blocks_")
        if block:
            number, _, inside = rest.partition("/")
            if inside.startswith("norm1"):
                continue
            inside = inside.replace("self_attention", "attention").replace("norm0", "norm1")
            name = f"{part}transformer/blocks_{2 + int(number)}/{inside}"
        plain[name] = value
    return unflatten(plain)


class PlainAutoencoder(nn.Module):
    """A 3-D MAE written down by itself: five blocks on un-shuffled tokens."""

    @nn.compact
    def __call__(self, images, noise):
        order = jnp.argsort(noise, axis=1)
        latent, _ = tiny().encoder.clone(name="encoder", parent=self)(images, order[:, :KEPT])
        return PlainDecoder(name="decoder")(latent, jnp.argsort(order, axis=1))


class PlainDecoder(nn.Module):
    @nn.compact
    def __call__(self, latent, restore):
        x = nn.Dense(18, name="embed")(latent)
        mask_token = self.param("mask_token", nn.initializers.zeros, (1, 1, 18))
        fillers = jnp.broadcast_to(mask_token, (len(x), TOKENS - KEPT, 18))
        tokens = gather_tokens(jnp.concatenate([x[:, 1:], fillers], axis=1), restore)
        x = jnp.concatenate([x[:, :1], tokens + sincos_positions_3d((2, 3, 2), 18)], axis=1)
        x, _ = Transformer(5, 3, name="transformer")(x)
        return nn.Dense(16, name="pred")(layer_norm("norm", jnp.float32)(x))[:, 1:]


def test_without_cross_attention_it_is_a_plain_mae_with_five_blocks():
    plain = tiny(model__cross_attention=False)
    params = without_cross_attention(variables()["params"])
    like = jax.eval_shape(lambda: plain.init(jax.random.key(0), {"image": VOLUMES}))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, dict(like))
    ours = loss_of(VOLUMES, method=plain, params={"params": params})
    # Output projections of zero take the attention to levels out of the other model.
    silent = {
        name: np.zeros_like(value) if "cross_attention/out" in name else value
        for name, value in flatten(variables()["params"]).items()
    }
    assert loss_of(VOLUMES, params={"params": unflatten(silent)}) == pytest.approx(ours, rel=1e-5)
    pred = PlainAutoencoder().apply({"params": params}, VOLUMES, NOISE)
    order = jnp.argsort(NOISE, axis=1)
    error = gather_tokens(pred, order[:, KEPT:]) - plain.target(VOLUMES, order)
    assert float(jnp.mean(error**2)) == pytest.approx(ours, rel=1e-5)
    assert loss_of(VOLUMES) != pytest.approx(ours, rel=1e-3)


def test_first_position_is_all_sines_zero_and_cosines_one():
    table = sincos_positions((2, 3, 4), 12, leading_tokens=1)
    assert table.shape == (1 + 24, 12)
    np.testing.assert_array_equal(table[0], 0)
    np.testing.assert_array_equal(table[1], [0, 0, 1, 1] * 3)
    # The depth runs fastest, and has the last third.
    np.testing.assert_array_equal(table[2][:8], table[1][:8])
    np.testing.assert_allclose(table[2][8:], [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)])
    with pytest.raises(ValueError, match="divisible by 6"):
        sincos_positions((2, 2, 2), 16)


def test_patch_embedding_of_volumes_is_a_strided_convolution():
    embed = PatchEmbed(12, PATCH, 2)
    params = embed.init(jax.random.key(0), patchify(jnp.asarray(VOLUMES), PATCH))
    kernel = params["params"]["kernel"]
    theirs = jax.lax.conv_general_dilated(
        VOLUMES, kernel, PATCH, "VALID", dimension_numbers=("NXYZC", "XYZIO", "NXYZC")
    )
    ours = embed.apply(params, patchify(jnp.asarray(VOLUMES), PATCH))
    theirs = theirs.reshape(2, TOKENS, 12) + params["params"]["bias"]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_patches_of_volumes_come_back():
    patches = patchify(jnp.asarray(VOLUMES), PATCH)
    np.testing.assert_array_equal(patches[0, 1], VOLUMES[0, :2, :2, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, SIZE, PATCH), VOLUMES)


def test_kernels_and_outputs_of_another_patch_size_see_smooth_patches_alike():
    random = np.random.default_rng(0)
    kernel = random.normal(size=(3, 3, 3, 1, 5)).astype(np.float32)
    larger = resize_patch_kernel(kernel, (6, 6, 6), 1)
    ones = [np.full((x.shape[0],) * 3, 2.0).reshape(-1) for x in (kernel, larger)]
    small, large = (
        values @ x.reshape(-1, 5) for values, x in zip(ones, (kernel, larger), strict=True)
    )
    np.testing.assert_allclose(large, small, rtol=1e-4)
    outputs = resize_patch_outputs(np.ones((4, 27), np.float32), ((3,) * 3, 1), ((6,) * 3, 1))
    np.testing.assert_allclose(outputs, np.ones((4, 216)), rtol=1e-5)


def test_features_are_the_last_level_with_the_class_token_pooled():
    method = tiny()
    features = method.features(variables(), {"image": VOLUMES})
    levels = method.levels(variables(), {"image": VOLUMES})
    assert [x.shape for x in levels] == [(2, 1 + TOKENS, 12)] * 4
    np.testing.assert_array_equal(features.pooled, levels[-1][:, 0])
    np.testing.assert_array_equal(features.tokens, levels[-1][:, 1:])
    assert features.grid == (2, 3, 2)


def test_scanned_and_unrolled_models_are_the_same_function():
    scanned = tiny(model__scan=True, model__remat="full")
    like = jax.eval_shape(lambda: scanned.init(jax.random.key(0), {"image": VOLUMES}))["params"]
    params = scanned.layout().load(tiny().layout().save(variables()["params"]), like)
    ours = loss_of(VOLUMES, method=scanned, params={"params": params})
    assert ours == pytest.approx(loss_of(VOLUMES), rel=1e-5)


def test_official_file_with_its_prefix_comes_back_unchanged(tmp_path):
    method = tiny()
    state = method.layout().save(variables()["params"])
    path = tmp_path / "official.safetensors"
    write_state_dict(path, {f"module.{key}": value for key, value in state.items()})
    donor = read_donor(str(path), method)
    assert donor.method.model == method.model
    given = flatten(variables())
    assert set(donor.variables) == set(given)
    for name, value in given.items():
        np.testing.assert_array_equal(donor.variables[name], value)
    saved = method.layout().save(unflatten(donor.variables)["params"])
    for key, value in state.items():
        np.testing.assert_array_equal(saved[key], value)


def test_learned_positions_are_those_of_patches_alone():
    method = tiny(model__positions="learned_patches")
    params = flatten(variables(model__positions="learned_patches")["params"])
    assert params["encoder/positions"].shape == (TOKENS, 12)
    state = method.layout().save(unflatten(params))
    assert state["encoder_pos_embed"].shape == (1, TOKENS, 12)
    assert tiny().sized_like(state, {"heads": 2}).encoder.positions == "learned_patches"
    # A fixed table gives the start of a learned one, without the row of the class token.
    start = method.adopt("encoder/positions", {}, tiny())
    np.testing.assert_array_equal(start, sincos_positions_3d((2, 3, 2), 12))


@pytest.mark.parametrize("decay_all", [True, False])
def test_weight_decay_is_on_everything_or_as_intended(decay_all):
    method = tiny(optimizer__decay_all=decay_all)
    decayed = {
        name
        for name, value in flatten(variables()["params"]).items()
        if is_decayed(name, value, method.no_decay, decay_all=decay_all)
    }
    every = set(flatten(variables()["params"]))
    kernels = {name for name in every if name.endswith("kernel")}
    assert decayed == (every if decay_all else kernels)


def test_pictures_show_three_planes_of_volume_mask_and_reconstruction():
    picture = jax.jit(tiny().pictures)(
        variables(), {"image": VOLUMES}, {"mask": jax.random.key(0)}
    )["reconstruction"]
    assert len(picture.columns) == 9
    for plane, shape in (("axial", (6, 4)), ("coronal", (4, 4)), ("sagittal", (4, 6))):
        shown = [picture.columns[f"{plane}: {x}"] for x in ("volume", "visible")]
        assert shown[0].shape == (2, *shape, 2)
        hidden = np.asarray(shown[1]) == 0
        np.testing.assert_array_equal(np.where(hidden, 0, shown[0]), shown[1])
        assert hidden.any()
    # Front at the top, to the right of the patient at the right.
    axial = picture.columns["axial: volume"]
    np.testing.assert_array_equal(axial[:, 0, 0], VOLUMES[:, 0, -1, 2])


@pytest.mark.parametrize(
    ("variant", "total", "encoder", "decoder"),
    [
        ("large_p12", 368.0, 342.6, 21.0),
        ("base_p16", 101.9, 88.2, 12.2),
        ("large_p16", 372.3, 346.3, 22.3),
    ],
)
def test_parameter_counts_are_the_papers(variant, total, encoder, decoder):
    method = HiEndMAE.build(configs.load(f"hi_end_mae:{variant}", {"compute_dtype": "float32"}))
    shape = jax.ShapeDtypeStruct((1, 96, 96, 96, 1), jnp.float32)
    params = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": shape}))["params"]

    def millions(part) -> float:
        return sum(x.size for x in jax.tree.leaves(part)) / 1e6

    # The sheet counts tables, and embeddings of levels and the mask token beside the decoder.
    tables = method.encoder.position_table()[1:].size, method.model.decoder.position_table().size
    embeddings = {k: v for k, v in params["decoder"].items() if k.startswith(("embed", "mask"))}
    assert millions(params) + sum(tables) / 1e6 == pytest.approx(total, abs=0.06)
    assert millions(params["encoder"]) == pytest.approx(encoder, abs=0.06)
    ours = millions(params["decoder"]) - millions(embeddings)
    assert ours == pytest.approx(decoder, abs=0.06)


def test_the_method_is_known_by_its_name():
    assert method_class("hi_end_mae") is HiEndMAE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__image_size": (4, 6, 5)}, r"\(4, 6, 5\) is not divisible"),
        ({"data__image_size": (4, 6)}, "same number of axes"),
        ({"model__taps": (0, 2, 4)}, "from 0 to 3 for an encoder of depth 4"),
        ({"model__taps": (2, 1, 0)}, "ascending"),
        ({"model__width": 16}, "divisible by 6, got 16"),
    ],
)
def test_what_does_not_fit_together_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        method = tiny(**changes)
        jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": VOLUMES}))
