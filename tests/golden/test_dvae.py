"""DALL-E's tokenizer against the official code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.conversion.dvae import dvae_layout
from mim_jax.models.dvae import DVAEEncoder, logit_laplace_map, token_ids
from mim_jax.training.tree import flatten
from tests.golden.cases import Case, assert_close, case_params, images_nhwc


def build(cfg: dict) -> DVAEEncoder:
    assert cfg["group_count"] == 4 and cfg["logit_laplace_eps"] == 0.1
    return DVAEEncoder(
        cfg["n_hid"], cfg["n_blk_per_group"], cfg["vocab_size"], cfg["input_channels"]
    )


@pytest.mark.parametrize("path", case_params("cae", "dalle"))
def test_the_tokenizer_matches_and_its_round_trip_is_exact(path):
    case = Case(path)
    encoder = build(case.cfg)
    images = jnp.asarray(images_nhwc(case["in/images01"]))
    like = jax.eval_shape(lambda: encoder.init(jax.random.key(0), images))["params"]
    official = case.group("param")
    params = dvae_layout(encoder).load(official, like)
    mapped = logit_laplace_map(images)
    assert_close(mapped, images_nhwc(case["out/mapped"]), "mapped")
    logits, collected = jax.jit(
        lambda p, x: encoder.apply({"params": p}, x, capture_intermediates=True)
    )(params, mapped)
    assert_close(logits, images_nhwc(case["out/logits"]), "logits")
    group = collected["intermediates"]["group_1"]["__call__"][0]
    assert_close(group, images_nhwc(case["out/group1"]), "group 1")
    indices = case["out/indices"].reshape(len(images), -1)
    np.testing.assert_array_equal(token_ids(encoder, params, images), indices)
    saved = dvae_layout(encoder).save(params)
    assert set(saved) == set(official)
    for key, value in official.items():
        np.testing.assert_array_equal(saved[key], value)
    assert set(flatten(params)) == {rule.path for rule in dvae_layout(encoder).rules}
