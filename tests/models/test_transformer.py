import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mim_jax.layout import Layout, transformer_rules
from mim_jax.models.transformer import (
    ATTENTION,
    REMAT_POLICIES,
    Attention,
    Mlp,
    Transformer,
    attention_weights,
    class_attention,
    drop_path_scales,
    layer_norm,
    relative_position_index,
    restacked,
)
from mim_jax.training.flops import count_flops
from mim_jax.training.tree import flatten, map_with_path, unflatten

WIDTH, HEADS, DEPTH = 8, 2, 2


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


TOKENS = draw(2, 5, WIDTH)


def init(module, x) -> dict:
    return jax.device_get(jax.jit(module.init)(jax.random.key(0), x))["params"]


@functools.cache
def params() -> dict:
    """Of unrolled blocks, with biases that are not zero."""
    given = init(Transformer(DEPTH, HEADS), TOKENS)
    return jax.tree.map(lambda p: p + 0.1 * draw(*p.shape, seed=1), given)


def layout(scan: bool) -> Layout:
    rules = transformer_rules("blocks", "transformer", Transformer(DEPTH, HEADS, scan=scan), WIDTH)
    return Layout(tuple(rules))


@functools.cache
def stacked_params() -> dict:
    """The same weights for `scan=True`, through the official layout."""
    stacked = init(Transformer(DEPTH, HEADS, scan=True), TOKENS)
    state = layout(scan=False).save({"transformer": params()})
    return layout(scan=True).load(state, {"transformer": stacked})["transformer"]


def softmax_attention(p: dict, x: np.ndarray) -> np.ndarray:
    """Attention head by head, in float64."""
    p = {k: v.astype(np.float64) for k, v in flatten(p).items()}
    width = x.shape[-1]
    out = np.zeros_like(x, np.float64)
    for head in range(HEADS):
        query, key, value = (
            x @ p["qkv/kernel"][:, i, head] + p["qkv/bias"][i, head] for i in range(3)
        )
        logits = query @ key.swapaxes(1, 2) / np.sqrt(width / HEADS)
        weights = scipy.special.softmax(logits, axis=-1)
        out += weights @ value @ p["out/kernel"][head]
    return out + p["out/bias"]


def exact_gelu_mlp(p: dict, x: np.ndarray) -> np.ndarray:
    p = {k: v.astype(np.float64) for k, v in flatten(p).items()}
    hidden = x @ p["fc1/kernel"] + p["fc1/bias"]
    hidden = hidden * 0.5 * (1 + scipy.special.erf(hidden / np.sqrt(2)))
    return hidden @ p["fc2/kernel"] + p["fc2/bias"]


def normalized(p: dict, x: np.ndarray) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * p["scale"] + p["bias"]


def test_attention_equals_the_plain_formula():
    p = params()["blocks_0"]["attention"]
    ours = Attention(HEADS).apply({"params": p}, TOKENS)
    np.testing.assert_allclose(ours, softmax_attention(p, TOKENS), rtol=1e-5, atol=1e-5)


def test_mlp_uses_the_exact_gelu():
    p = params()["blocks_0"]["mlp"]
    x = 3 * TOKENS
    ours = Mlp(4.0).apply({"params": p}, x)
    # The tanh approximation of GELU is off by up to 5e-4.
    np.testing.assert_allclose(ours, exact_gelu_mlp(p, x), rtol=1e-5, atol=2e-5)


def test_layer_norm_has_the_epsilon_of_the_official_code():
    x = 1e-3 * TOKENS  # variance near 1e-6, where the epsilon decides
    norm = layer_norm("norm", jnp.float32)
    ours = norm.apply({"params": {"scale": np.ones(WIDTH), "bias": np.zeros(WIDTH)}}, x)
    expected = normalized({"scale": 1, "bias": 0}, x.astype(np.float64))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_blocks_are_pre_norm_with_two_residual_branches():
    x, outputs = jax.jit(Transformer(DEPTH, HEADS).apply)({"params": params()}, TOKENS)
    expected = TOKENS.astype(np.float64)
    for i in range(DEPTH):
        p = params()[f"blocks_{i}"]
        expected = expected + softmax_attention(p["attention"], normalized(p["norm1"], expected))
        expected = expected + exact_gelu_mlp(p["mlp"], normalized(p["norm2"], expected))
        np.testing.assert_allclose(outputs[i], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(x, outputs[-1])


def test_scanned_blocks_compute_the_same_function_for_the_same_weights():
    x, outputs = jax.jit(Transformer(DEPTH, HEADS).apply)({"params": params()}, TOKENS)
    scanned = Transformer(DEPTH, HEADS, scan=True)
    x_scanned, outputs_scanned = jax.jit(scanned.apply)({"params": stacked_params()}, TOKENS)
    np.testing.assert_allclose(x_scanned, x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs_scanned, np.stack(outputs), rtol=1e-5, atol=1e-5)


def value_and_gradient(module: Transformer, p: dict):
    return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(module.apply({"params": p}, TOKENS)[0])))(p)


@functools.cache
def computed(remat: str, scan: bool):
    module = Transformer(DEPTH, HEADS, scan=scan, remat=remat)
    p = stacked_params() if scan else params()
    return jax.jit(functools.partial(value_and_gradient, module))(p)


@pytest.mark.parametrize(("remat", "scan"), [("full", False), ("full", True), ("dots", False)])
def test_rematerialization_changes_neither_value_nor_gradient(remat, scan):
    ours, expected = computed(remat, scan), computed("none", scan)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_rematerialization_computes_matrix_products_again():
    operations = {}
    for remat in REMAT_POLICIES:
        step = functools.partial(value_and_gradient, Transformer(DEPTH, HEADS, remat=remat))
        operations[remat] = count_flops(step, params())
    assert operations["none"] <= operations["dots"] < operations["full"]


def test_an_unknown_attention_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="attention is 'flash'; known are 'xla' and 'cudnn'"):
        jax.eval_shape(Transformer(1, HEADS, attention="flash").init, jax.random.key(0), TOKENS)


def test_an_unknown_remat_policy_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="remat is 'everything'; known are none, full, dots"):
        jax.eval_shape(Transformer(1, HEADS, remat="everything").init, jax.random.key(0), TOKENS)


def test_heads_that_do_not_divide_the_width_are_an_error():
    with pytest.raises(ValueError, match="width 8 is not divisible by 3 attention heads"):
        jax.eval_shape(Transformer(1, 3).init, jax.random.key(0), TOKENS)


def test_bfloat16_compute_keeps_float32_parameters_and_stays_near():
    module = Transformer(DEPTH, HEADS, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    rough, _ = jax.jit(module.apply)({"params": params()}, TOKENS.astype(jnp.bfloat16))
    exact, _ = jax.jit(Transformer(DEPTH, HEADS).apply)({"params": params()}, TOKENS)
    assert rough.dtype == jnp.bfloat16
    error = np.abs(rough.astype(np.float32) - exact)
    assert 0 < error.max() < 0.1 * np.abs(exact).max()


def assert_uniform(values: np.ndarray, bound: float) -> None:
    """Uniform in +-bound, for at least some thousand values."""
    assert np.abs(values).max() <= bound
    assert np.abs(values).max() > 0.99 * bound
    np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=0.03)
    assert abs(values.mean()) < 5 * bound / np.sqrt(3 * values.size)


@pytest.mark.parametrize("scan", [False, True])
def test_initial_weights_are_xavier_uniform_with_the_fused_qkv_as_one_matrix(scan):
    width, ratio = 256, 2
    given = init(Transformer(2, 4, ratio, scan=scan), np.zeros((1, 2, width), np.float32))
    if scan:
        given = unflatten(
            {
                f"blocks_{i}/{path.removeprefix('blocks/')}": leaf[i]
                for path, leaf in flatten(given).items()
                for i in range(2)
            }
        )
    bounds = {
        "attention/qkv/kernel": np.sqrt(6 / (width + 3 * width)),
        "attention/out/kernel": np.sqrt(6 / (width + width)),
        "mlp/fc1/kernel": np.sqrt(6 / (width + ratio * width)),
        "mlp/fc2/kernel": np.sqrt(6 / (width + ratio * width)),
    }
    for i in range(2):
        block = flatten(given[f"blocks_{i}"])
        for path, bound in bounds.items():
            assert_uniform(block[path], bound)
        for path in set(block) - set(bounds):
            np.testing.assert_array_equal(block[path], 1 if path.endswith("scale") else 0)
    assert np.any(
        given["blocks_0"]["mlp"]["fc1"]["kernel"] != given["blocks_1"]["mlp"]["fc1"]["kernel"]
    )


def test_parameter_paths_say_which_block_they_belong_to():
    paths = set(flatten(params()))
    assert {path.split("/")[0] for path in paths} == {"blocks_0", "blocks_1"}
    shapes = jax.eval_shape(Transformer(DEPTH, HEADS, scan=True).init, jax.random.key(0), TOKENS)
    map_with_path(lambda path, leaf: leaf.shape[0] == DEPTH or pytest.fail(path), shapes["params"])
    assert set(flatten(shapes["params"])) == {"blocks/" + p.split("/", 1)[1] for p in paths}


def test_a_dropped_branch_leaves_the_tokens_and_a_kept_one_is_scaled_up():
    noise = np.full((DEPTH, 2, 2), 0.99, np.float32)
    noise[1, :, 0] = 0.0  # both branches of the last block, for the first sample
    model = Transformer(DEPTH, HEADS, drop_path=0.5)
    out, blocks = model.apply({"params": params()}, TOKENS, noise)
    np.testing.assert_array_equal(out[0], blocks[0][0])
    whole, _ = Transformer(DEPTH, HEADS).apply({"params": params()}, TOKENS)
    assert not np.allclose(out[1], whole[1])


@pytest.mark.parametrize("scan", [False, True])
def test_rate_0_and_no_noise_keep_every_branch(scan):
    given = {"params": stacked_params() if scan else params()}
    noise = np.zeros((DEPTH, 2, 2), np.float32)
    plain = Transformer(DEPTH, HEADS, scan=scan).apply(given, TOKENS)[0]
    for model, drawn in (
        (Transformer(DEPTH, HEADS, scan=scan), noise),
        (Transformer(DEPTH, HEADS, scan=scan, drop_path=0.5), None),
    ):
        np.testing.assert_array_equal(model.apply(given, TOKENS, drawn)[0], plain)


def test_drop_path_is_the_same_in_a_loop_and_unrolled():
    noise = np.random.default_rng(3).random((DEPTH, 2, 2)).astype(np.float32)
    unrolled = Transformer(DEPTH, HEADS, drop_path=0.6).apply({"params": params()}, TOKENS, noise)
    looped = Transformer(DEPTH, HEADS, drop_path=0.6, scan=True).apply(
        {"params": stacked_params()}, TOKENS, noise
    )
    np.testing.assert_allclose(looped[0], unrolled[0], rtol=1e-5, atol=1e-6)


def test_the_mean_over_many_draws_of_drop_path_is_the_whole_branch():
    noise = np.random.default_rng(0).random((DEPTH, 2, 20_000)).astype(np.float32)
    scales = drop_path_scales(noise, 0.4)
    np.testing.assert_allclose(scales.mean(axis=2)[..., 0, 0], 1, atol=0.02)
    np.testing.assert_array_equal(scales[0], 1)  # the first block is never dropped


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match="drop_path is"):
        init(Transformer(DEPTH, HEADS, drop_path=rate), TOKENS)


@pytest.mark.parametrize(("old", "new"), [(False, True), (True, False), (True, True)])
def test_weights_are_restacked_exactly(old, new):
    trees = {False: params(), True: stacked_params()}
    given = flatten({"transformer": trees[old]})
    for name, value in flatten({"transformer": trees[new]}).items():
        found = restacked(
            name, given, Transformer(DEPTH, HEADS, scan=old), Transformer(DEPTH, HEADS, scan=new)
        )
        np.testing.assert_array_equal(found, value, err_msg=name)


def test_blocks_that_the_donor_lacks_are_none():
    given = flatten({"transformer": stacked_params()})
    donor, receiver = Transformer(DEPTH, HEADS, scan=True), Transformer(9, HEADS)
    assert restacked("transformer/blocks_5/norm1/scale", given, donor, receiver) is None
    assert restacked("transformer/blocks/norm1/scale", {}, receiver, donor) is None


def own_attention(**fields):
    """An attention of `fields` with random parameters, those of `params` where it has them."""
    module = Attention(HEADS, **fields)
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    drawn = {k: draw(*leaf.shape, seed=7) for k, leaf in flatten(shapes).items()}
    given = flatten(params()["blocks_0"]["attention"])
    return module, unflatten({k: given.get(k, v) for k, v in drawn.items()})


def test_capped_logits_are_bounded_smoothly():
    query, key = 9 * draw(2, 5, HEADS, 4), 9 * draw(2, 5, HEADS, 4, seed=1)
    logits = np.einsum("bthd,bshd->bhts", query, key).astype(np.float64) / 2
    assert np.abs(logits).max() > 50
    ours = attention_weights(query, key, logit_cap=3.0)
    expected = scipy.special.softmax(3 * np.tanh(logits / 3), axis=-1)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert (ours.max(-1) / ours.min(-1)).max() <= np.exp(6) * 1.001


def test_cap_far_above_the_logits_changes_nothing():
    p = params()["blocks_0"]["attention"]
    capped = Attention(HEADS, logit_cap=1e5).apply({"params": p}, TOKENS)
    np.testing.assert_allclose(capped, softmax_attention(p, TOKENS), rtol=1e-4, atol=1e-5)


def test_biases_of_query_and_value_are_a_full_bias_whose_key_part_is_zero():
    module, p = own_attention(qkv_bias="query_value")
    bias = np.stack([p["query_bias"], np.zeros_like(p["query_bias"]), p["value_bias"]])
    full = {"qkv": {"kernel": p["qkv"]["kernel"], "bias": bias}, "out": p["out"]}
    ours = module.apply({"params": p}, TOKENS)
    np.testing.assert_allclose(ours, softmax_attention(full, TOKENS), rtol=1e-4, atol=1e-5)


def test_an_unknown_bias_or_activation_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="qkv_bias is 'key'; known are full, query_value, none"):
        own_attention(qkv_bias="key")
    with pytest.raises(ValueError, match="activation is 'relu'; known are gelu, gelu_tanh, quick"):
        jax.eval_shape(Mlp(4.0, activation="relu").init, jax.random.key(0), TOKENS)


@pytest.mark.parametrize("cap", [None, 50.0])
def test_causal_blocks_hide_later_tokens(cap):
    module = Transformer(DEPTH, HEADS, causal=True, logit_cap=cap)
    apply = jax.jit(module.apply)
    other = TOKENS.copy()
    other[:, 3:] += 5
    ours, changed = (np.asarray(apply({"params": params()}, x)[0]) for x in (TOKENS, other))
    np.testing.assert_allclose(changed[:, :3], ours[:, :3], rtol=1e-5, atol=1e-5)
    assert not np.allclose(changed[:, 3:], ours[:, 3:])


def test_quick_gelu_is_that_of_openais_clip():
    p = params()["blocks_0"]["mlp"]
    hidden = TOKENS.astype(np.float64) @ p["fc1"]["kernel"] + p["fc1"]["bias"]
    hidden = hidden / (1 + np.exp(-1.702 * hidden))
    expected = hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"]
    ours = Mlp(4.0, activation="quick_gelu").apply({"params": p}, TOKENS)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-5)


def test_layer_scale_starts_at_its_value_and_scales_both_branches():
    module = Transformer(1, HEADS, layer_scale=0.25)
    p = init(module, TOKENS)["blocks_0"]
    for i in (1, 2):
        np.testing.assert_array_equal(p[f"layer_scale{i}"]["scale"], np.full(WIDTH, 0.25))
    p = {**params()["blocks_0"], **{k: p[k] for k in ("layer_scale1", "layer_scale2")}}
    p["layer_scale2"] = {"scale": draw(WIDTH, seed=3)}
    x = TOKENS.astype(np.float64)
    x = x + 0.25 * softmax_attention(p["attention"], normalized(p["norm1"], x))
    x = x + p["layer_scale2"]["scale"] * exact_gelu_mlp(p["mlp"], normalized(p["norm2"], x))
    ours, _ = module.apply({"params": {"blocks_0": p}}, TOKENS)
    np.testing.assert_allclose(ours, x, rtol=1e-4, atol=1e-4)


def test_index_of_relative_positions_depends_on_the_offset_alone():
    rows, columns = 2, 3
    index = relative_position_index((rows, columns))
    assert index.shape == (7, 7)
    by_offset = {}
    places = [(r, c) for r in range(rows) for c in range(columns)]
    for i, (r, c) in enumerate(places, 1):
        for j, (other_r, other_c) in enumerate(places, 1):
            by_offset.setdefault((r - other_r, c - other_c), set()).add(int(index[i, j]))
    assert all(len(found) == 1 for found in by_offset.values())
    numbers = sorted(next(iter(found)) for found in by_offset.values())
    assert numbers == list(range(3 * 5))  # every offset has a row of its own
    assert set(index[0, 1:]) == {15} and set(index[1:, 0]) == {16} and index[0, 0] == 17


def test_table_of_relative_positions_is_added_to_the_logits():
    x = draw(2, 7, WIDTH)
    module = Attention(HEADS, position_bias=(2, 3))
    p = {**params()["blocks_0"]["attention"], "position_bias": {"table": draw(18, HEADS)}}
    bias = p["position_bias"]["table"][relative_position_index((2, 3))].transpose(2, 0, 1)
    p64 = {k: v.astype(np.float64) for k, v in flatten(p).items()}
    qkv = np.einsum("btw,wihd->ibhtd", x, p64["qkv/kernel"])
    qkv += p64["qkv/bias"][:, None, :, None]
    weights = scipy.special.softmax(qkv[0] @ qkv[1].swapaxes(-1, -2) / 2 + bias, axis=-1)
    expected = np.einsum("bhtd,hdw->btw", weights @ qkv[2], p64["out/kernel"]) + p64["out/bias"]
    ours = module.apply({"params": p}, x)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    plain = {k: v for k, v in p.items() if k != "position_bias"}
    given = Attention(HEADS).apply({"params": plain}, x, jnp.asarray(bias)[None])
    np.testing.assert_allclose(given, ours, rtol=1e-5, atol=1e-6)


def test_heads_may_have_a_width_of_their_own():
    shapes = jax.eval_shape(Attention(3, head_width=5).init, jax.random.key(0), TOKENS)["params"]
    assert shapes["qkv"]["kernel"].shape == (WIDTH, 3, 3, 5)
    assert shapes["out"]["kernel"].shape == (3, 5, WIDTH)


def test_attention_is_shown_on_request_whether_or_not_blocks_are_stacked():
    found = []
    for scan, p in ((False, params()), (True, stacked_params())):
        module = Transformer(DEPTH, HEADS, scan=scan)
        seen, collected = module.apply({"params": p}, TOKENS, mutable=[ATTENTION])
        plain = module.apply({"params": p}, TOKENS)
        np.testing.assert_array_equal(seen[0], plain[0])
        found.append(np.asarray(class_attention(collected[ATTENTION], module, 2)))
    weights = collected[ATTENTION]["blocks"]["attention"]["weights"]
    assert weights.shape == (DEPTH, 2, HEADS, 5, 5)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found[1], weights[-1].mean(1)[:, 0, 2:], rtol=1e-6)
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)
