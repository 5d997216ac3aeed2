import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax.layout import AS_IS, CONV2D, Constant, Layout, Rule, linear, reshape
from mim_jax.training.tree import flatten, unflatten
from tests.methods.tiny import images, tiny_mae, tiny_params

few = settings(max_examples=15, deadline=None)
size = st.integers(1, 5)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def shapes_of(method) -> dict:
    return jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": images()}))["params"]


def official() -> dict[str, np.ndarray]:
    return tiny_mae().layout().save(tiny_params())


def load(state: dict[str, np.ndarray]) -> dict:
    return tiny_mae().layout().load(state, tiny_params())


def problems_of(state: dict[str, np.ndarray]) -> list[str]:
    """The lines of the one error that lists everything."""
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load(state)
    first, *lines, last = str(error.value).splitlines()
    assert first == "the checkpoint does not fit the model:"
    assert "Check that the config's model" in last
    return [line.strip() for line in lines]


@few
@given(size, size)
def test_a_linear_weight_is_transposed(inputs, outputs):
    weight = draw(outputs, inputs)
    kernel = linear().load(weight)
    np.testing.assert_array_equal(kernel, weight.T)
    np.testing.assert_array_equal(linear().save(kernel), weight)


@few
@given(size, size, size)
def test_a_fused_qkv_weight_has_rows_by_query_key_value_and_head(heads, head_width, width):
    weight = draw(3 * heads * head_width, width)
    transform = linear(outputs=(3, heads, head_width))
    kernel = transform.load(weight)
    for i in range(3):
        for head in range(heads):
            start = (i * heads + head) * head_width
            np.testing.assert_array_equal(kernel[:, i, head], weight[start : start + head_width].T)
    np.testing.assert_array_equal(transform.save(kernel), weight)


@few
@given(size, size, size)
def test_an_output_projection_has_columns_by_head(heads, head_width, width):
    weight = draw(width, heads * head_width)
    transform = linear(inputs=(heads, head_width))
    kernel = transform.load(weight)
    for head in range(heads):
        columns = weight[:, head * head_width : (head + 1) * head_width]
        np.testing.assert_array_equal(kernel[head], columns.T)
    np.testing.assert_array_equal(transform.save(kernel), weight)


@few
@given(size, size, size, size)
def test_a_convolution_weight_moves_its_channels_last(outputs, inputs, height, width):
    weight = draw(outputs, inputs, height, width)
    kernel = CONV2D.load(weight)
    assert kernel.shape == (height, width, inputs, outputs)
    assert kernel[0, -1, 0, -1] == weight[-1, 0, 0, -1]
    np.testing.assert_array_equal(CONV2D.save(kernel), weight)


def test_reshape_and_as_is_are_their_own_inverses():
    bias = draw(12)
    split = reshape((3, 2, 2), (-1,))
    np.testing.assert_array_equal(split.save(split.load(bias)), bias)
    np.testing.assert_array_equal(AS_IS.save(AS_IS.load(bias)), bias)


@pytest.mark.parametrize("scan", [False, True])
def test_a_round_trip_from_our_parameters_is_exact(scan):
    method = tiny_mae({"model.scan": scan})
    shapes = shapes_of(method)
    params = method.layout().load(official(), shapes)
    again = method.layout().load(method.layout().save(params), params)
    assert set(flatten(again)) == set(flatten(shapes))
    for path, value in flatten(params).items():
        assert value.dtype == np.float32
        assert value.shape == flatten(shapes)[path].shape
        np.testing.assert_array_equal(flatten(again)[path], value)


@pytest.mark.parametrize("scan", [False, True])
def test_a_round_trip_from_an_official_checkpoint_is_exact(scan):
    method, state = tiny_mae({"model.scan": scan}), official()
    again = method.layout().save(method.layout().load(state, shapes_of(method)))
    assert set(again) == set(state)
    for key, value in state.items():
        assert again[key].flags.c_contiguous
        np.testing.assert_array_equal(again[key], value)


def test_stacked_blocks_are_the_unrolled_blocks_in_order():
    method = tiny_mae({"model.scan": True})
    stacked = method.layout().load(official(), shapes_of(method))["encoder"]["transformer"]
    unrolled = tiny_params()["encoder"]["transformer"]
    for i in range(2):
        np.testing.assert_array_equal(
            stacked["blocks"]["mlp"]["fc1"]["kernel"][i],
            unrolled[f"blocks_{i}"]["mlp"]["fc1"]["kernel"],
        )


def test_the_official_checkpoint_has_the_official_keys_and_shapes():
    shapes = {key: value.shape for key, value in official().items()}
    width, narrow, patch = 16, 8, 4
    for prefix, d in (("blocks.1", width), ("decoder_blocks.1", narrow)):
        assert shapes[f"{prefix}.attn.qkv.weight"] == (3 * d, d)
        assert shapes[f"{prefix}.attn.qkv.bias"] == (3 * d,)
        assert shapes[f"{prefix}.attn.proj.weight"] == (d, d)
        assert shapes[f"{prefix}.mlp.fc1.weight"] == (4 * d, d)
        assert shapes[f"{prefix}.mlp.fc2.weight"] == (d, 4 * d)
        assert shapes[f"{prefix}.norm2.bias"] == (d,)
    assert shapes["cls_token"] == (1, 1, width)
    assert shapes["pos_embed"] == (1, 1 + 6, width)
    assert shapes["patch_embed.proj.weight"] == (width, 1, patch, patch)
    assert shapes["decoder_embed.weight"] == (narrow, width)
    assert shapes["mask_token"] == (1, 1, narrow)
    assert shapes["decoder_pos_embed"] == (1, 1 + 6, narrow)
    assert shapes["decoder_pred.weight"] == (patch * patch, narrow)
    assert len(shapes) == 4 + 2 * 12 + 2 + 2 + 1 + 1 + 2 * 12 + 2 + 2


def test_missing_unexpected_and_wrongly_shaped_keys_are_listed_in_one_error():
    state = official()
    del state["norm.weight"], state["blocks.1.attn.qkv.bias"]
    state |= {"head.weight": draw(10, 16), "fc_norm.bias": draw(16)}
    state["cls_token"] = draw(1, 1, 12)
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].T
    assert problems_of(state) == [
        "missing: blocks.1.attn.qkv.bias",
        "missing: norm.weight",
        "unexpected: fc_norm.bias",
        "unexpected: head.weight",
        "cls_token: shape (1, 1, 12) in the file, (1, 1, 16) in the model",
        "blocks.0.mlp.fc1.weight: shape (16, 64) in the file, (64, 16) in the model",
    ]


def test_an_encoder_only_file_is_accepted_and_leaves_the_decoder_out():
    state = {k: v for k, v in official().items() if not re.match("decoder_|mask_token", k)}
    params = load(state)
    assert set(params) == {"encoder"}
    expected = flatten(tiny_params()["encoder"])
    assert set(flatten(params["encoder"])) == set(expected)
    for path, value in flatten(params["encoder"]).items():
        np.testing.assert_array_equal(value, expected[path])


def test_a_partly_present_decoder_is_refused_with_the_list():
    state = {k: v for k, v in official().items() if not k.startswith("decoder_blocks.1.")}
    del state["mask_token"]
    problems = problems_of(state)
    assert len(problems) == 12 + 1
    assert "missing: mask_token" in problems
    assert "missing: decoder_blocks.1.attn.proj.weight" in problems


def test_a_missing_encoder_is_refused():
    state = {k: v for k, v in official().items() if re.match("decoder_|mask_token", k)}
    assert "missing: blocks.0.norm1.weight" in problems_of(state)


@pytest.mark.parametrize("key", ["pos_embed", "decoder_pos_embed"])
def test_a_changed_position_table_is_refused(key):
    state = official()
    state[key] = state[key].copy()
    state[key][0, 3, 1] += 0.5
    assert problems_of(state) == [f"{key}: differs from this model's fixed table by up to 0.5"]
    state[key][0, 3, 1] = np.nan
    assert problems_of(state) == [f"{key}: differs from this model's fixed table by up to nan"]


def test_a_position_table_of_another_grid_is_refused():
    state = official() | {"pos_embed": draw(1, 1 + 9, 16)}
    assert problems_of(state) == [
        "pos_embed: shape (1, 10, 16) in the file, (1, 7, 16) in the model"
    ]


def test_a_position_table_with_the_rounding_of_another_library_passes():
    state = official()
    state["pos_embed"] = state["pos_embed"] + np.float32(1e-6)
    assert set(load(state)) == {"encoder", "decoder"}


def test_half_precision_files_become_float32():
    half = {key: value.astype(np.float16) for key, value in official().items()}
    half |= {key: official()[key] for key in ("pos_embed", "decoder_pos_embed")}
    for path, value in flatten(load(half)).items():
        assert value.dtype == np.float32, path


def test_a_checkpoint_with_another_number_of_blocks_is_refused():
    deeper = tiny_mae({"model.depth": 3}).layout()
    with pytest.raises(ValueError, match=r"missing: blocks\.2\.attn\.proj\.bias"):
        deeper.load(official(), tiny_params())


def test_a_rule_for_a_parameter_that_the_model_lacks_is_named():
    layout = Layout((Rule("a", "x/a"), Rule("b", "x/b")))
    with pytest.raises(ValueError, match="b: the model has no parameter x/b"):
        layout.load({"a": draw(2), "b": draw(2)}, {"x": {"a": draw(2)}})


def test_saving_lists_missing_and_extra_parameters_together():
    flat = flatten(tiny_params())
    del flat["encoder/cls_token"]
    flat["head/kernel"] = draw(16, 10)
    with pytest.raises(ValueError) as error:
        tiny_mae().layout().save(unflatten(flat))
    assert str(error.value).splitlines()[1:] == [
        "  no rule for parameter head/kernel",
        "  no parameter encoder/cls_token",
    ]


def test_a_constant_is_written_and_checked_but_is_no_parameter():
    layout = Layout((Rule("a", "a"),), (Constant("table", draw(2, 3)),))
    state = layout.save({"a": draw(4)})
    np.testing.assert_array_equal(state["table"], draw(2, 3))
    assert set(layout.load(state, {"a": draw(4)})) == {"a"}
    with pytest.raises(ValueError, match="missing: table"):
        layout.load({"a": draw(4)}, {"a": draw(4)})
