import functools

import jax
import numpy as np
import pytest

from mim_jax.models.text import TextTower
from mim_jax.models.transformer import Transformer

TOWER = TextTower(20, 6, 8, Transformer(2, 2, causal=True), outputs=5)
IDS = np.array([[3, 7, 19, 1, 2], [1, 19, 4, 19, 0]])
"""Texts whose end, the largest id, is followed by something."""


@functools.cache
def params():
    given = jax.device_get(jax.jit(TOWER.init)(jax.random.key(0), IDS))["params"]
    random = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + random.normal(0, 0.3, p.shape).astype(np.float32), given)


@functools.cache
def compiled(tower):
    return jax.jit(tower.apply)


def read(tower=TOWER, ids=IDS, given=None):
    return compiled(tower)({"params": given or params()}, ids)


def test_text_is_represented_by_its_first_end_token():
    found = read()
    expected = np.asarray(found.tokens)[[0, 1], [2, 1]] @ params()["projection"]["kernel"]
    np.testing.assert_allclose(found.pooled, expected, rtol=1e-5, atol=1e-5)
    assert found.pooled.shape == (2, 5)


def test_what_follows_the_end_changes_nothing():
    other = IDS.copy()
    other[0, 3:], other[1, 2:] = (5, 6), (8, 8, 8)
    np.testing.assert_allclose(read(ids=other).pooled, read().pooled, rtol=1e-5, atol=1e-6)
    other[:, 0] = 9
    assert not np.allclose(read(ids=other).pooled, read().pooled)


def test_end_may_be_an_id_of_ones_choice():
    found = read(TOWER.clone(end_token=1))
    expected = np.asarray(found.tokens)[[0, 1], [3, 0]] @ params()["projection"]["kernel"]
    np.testing.assert_allclose(found.pooled, expected, rtol=1e-5, atol=1e-5)


def test_without_projection_the_token_itself_represents_the_text():
    given = {k: v for k, v in params().items() if k != "projection"}
    found = read(TOWER.clone(outputs=0), given=given)
    expected = np.asarray(found.tokens)[[0, 1], [2, 1]]
    np.testing.assert_allclose(found.pooled, expected, rtol=1e-6, atol=1e-6)


def test_shorter_texts_have_the_first_positions():
    whole, part = read(), read(ids=IDS[:, :3])
    np.testing.assert_allclose(part.tokens, whole.tokens[:, :3], rtol=1e-5, atol=1e-5)
    assert len(whole.blocks) == 2


def test_texts_that_are_too_long_and_blocks_that_see_ahead_are_refused():
    with pytest.raises(ValueError, match="texts have 7 tokens, but the tower reads 6"):
        read(ids=np.zeros((1, 7), int))
    with pytest.raises(ValueError, match="needs blocks that are causal"):
        read(TOWER.clone(transformer=Transformer(2, 2)))
