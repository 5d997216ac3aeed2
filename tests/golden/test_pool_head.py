"""Locality Alignment's pooling head of one transformer block against the official code."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.layout import Layout, Rule, layer_norm_rules, linear_rules, transformer_rules
from mim_jax.losses import cross_entropy
from mim_jax.models.pooling import TransformerPool, pooling_blocks
from tests.golden.cases import Case, assert_close, assert_gradient_close, case_params

pools = pytest.mark.parametrize("path", case_params("locality_alignment", "pool"))


@functools.cache
def read(path) -> Case:
    return Case(path)


class Head(nn.Module):
    """Pool and linear layer, as the fine-tuned classifier has them."""

    pool: TransformerPool
    num_classes: int

    @nn.compact
    def __call__(self, tokens):
        pooled = self.pool(tokens).mean(axis=1)
        return nn.Dense(self.num_classes, name="head")(pooled), pooled


def build(cfg: dict) -> Head:
    blocks = pooling_blocks(
        cfg["num_heads"],
        cfg["num_layers"],
        mlp_ratio=cfg["mlp_ratio"],
        qkv_bias="full" if cfg["qkv_bias"] else "none",
        epsilon=float(cfg["norm"].split("eps=")[1]),
    )
    return Head(TransformerPool(blocks), cfg["num_classes"])


def layout(head: Head, width: int) -> Layout:
    blocks = head.pool.transformer
    return Layout(
        rules=(
            Rule("attn_pool.pos_embed", "pool/positions"),
            *transformer_rules("attn_pool.blocks", "pool/transformer", blocks, width),
            *layer_norm_rules("attn_pool.norm", "pool/norm"),
            *linear_rules("head", "head"),
        )
    )


@pools
def test_pooled_logits_loss_and_gradients_match(path):
    case = read(path)
    head = build(case.cfg)
    tokens = jnp.asarray(case["in/tokens"])
    like = jax.eval_shape(lambda: head.init(jax.random.key(0), tokens))["params"]
    table = layout(head, tokens.shape[-1])
    params = table.load(case.group("param"), like)
    labels = jnp.asarray(case["in/labels"].astype(np.int32))

    def loss_of(params):
        logits, pooled = head.apply({"params": params}, tokens)
        return cross_entropy(logits, labels), (logits, pooled)

    (loss, (logits, pooled)), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    assert_close(pooled, case["out/pooled"], "pooled")
    assert_close(logits, case["out/logits"], "logits")
    assert_close(loss, case["out/loss"], "loss")
    ours = table.save(jax.device_get(gradient))
    assert set(ours) == set(case.group("grad"))
    for key, value in case.group("grad").items():
        assert_gradient_close(ours[key], value, key)
    again = table.save(params)
    for key, value in case.group("param").items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
