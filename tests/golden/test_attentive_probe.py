"""CAE's attentive probe on its encoder against the official code: query, batch norm, classifier."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import layout
from mim_jax.evaluation.attentive_probe import AttentiveHead, AttentiveProbe
from mim_jax.evaluation.probe import ProbeHead
from mim_jax.losses import cross_entropy
from mim_jax.models.transformer import Transformer
from mim_jax.models.vit import ViT
from tests.golden.cases import (
    Case,
    assert_close,
    assert_gradient_close,
    case_params,
    images_nhwc,
)
from tests.golden.test_mae import pair

probes = pytest.mark.parametrize("path", case_params("cae", "attentive"))

SHIFTS = tuple(
    f"attentive_blocks.0.{name}"
    for name in ("norm_v.bias", "cross_attn.v_bias", "cross_attn.proj.bias")
)
"""Biases that add the same to every example, which the batch norm takes out: their gradient is
zero, and what either code gives instead is rounding."""

STATISTICS = {"fc_norm.running_mean": "mean", "fc_norm.running_var": "var"}


@functools.cache
def read(path) -> Case:
    return Case(path)


def encoder_of(cfg: dict, channels: int) -> ViT:
    assert cfg["sin_pos_emb"] and cfg["qkv_bias"] and not cfg["use_rel_pos_bias"]
    blocks = Transformer(
        cfg["depth"],
        cfg["num_heads"],
        cfg["mlp_ratio"],
        epsilon=cfg["norm_eps"],
        qkv_bias="query_value",
        layer_scale=cfg["init_values"],
    )
    return ViT(
        pair(cfg["img_size"]),
        pair(cfg["patch_size"]),
        channels,
        cfg["embed_dim"],
        blocks,
        positions="sincos_row_first",
    )


def layout_of(encoder: ViT, head: AttentiveHead) -> layout.Layout:
    """The official names of the trained arrays; the running statistics are no parameters here."""
    heads = (head.heads, encoder.width // head.heads)
    block, pool = "attentive_blocks.0", "head/pool"
    rules = [layout.Rule("query_token", f"{pool}/token")]
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        rules += layout.layer_norm_rules(f"{block}.norm_{letter}", f"{pool}/{name}_norm")
        rules.append(
            layout.Rule(
                f"{block}.cross_attn.{letter}.weight",
                f"{pool}/{name}/kernel",
                layout.linear(outputs=heads),
            )
        )
        if name != "key":
            rules.append(
                layout.Rule(
                    f"{block}.cross_attn.{letter}_bias",
                    f"{pool}/{name}_bias",
                    layout.reshape(heads, (-1,)),
                )
            )
    rules += [
        layout.Rule(
            f"{block}.cross_attn.proj.weight", f"{pool}/out/kernel", layout.linear(inputs=heads)
        ),
        layout.Rule(f"{block}.cross_attn.proj.bias", f"{pool}/out/bias"),
        *layout.linear_rules("head", "head/classifier/linear"),
    ]
    return layout.Layout(
        rules=(*layout.vit_rules("encoder", encoder, names=layout.CAE), *rules),
        constants=layout.vit_constants(encoder),
    )


def build(case: Case):
    """Encoder, head, images, parameters, running statistics and layout."""
    images = jnp.asarray(images_nhwc(case["in/images"]))
    encoder = encoder_of(case.cfg, images.shape[-1])
    head = AttentiveHead(case.cfg["num_classes"], case.cfg["num_heads"])
    tokens = jnp.zeros((2, 1 + np.prod(encoder.grid), encoder.width))
    like = {
        "encoder": jax.eval_shape(lambda: encoder.init(jax.random.key(0), images))["params"],
        "head": jax.eval_shape(lambda: head.init(jax.random.key(0), tokens, train=True))["params"],
    }
    table = layout_of(encoder, head)
    official = case.group("param")
    buffers = {key for key in official if key.startswith("fc_norm.")}
    params = table.load({k: v for k, v in official.items() if k not in buffers}, like)
    statistics = {ours: jnp.asarray(official[key]) for key, ours in STATISTICS.items()}
    return encoder, head, images, params, {"classifier": statistics}, table


@probes
def test_logits_loss_statistics_and_all_gradients_match(path):
    case = read(path)
    encoder, head, images, params, statistics, table = build(case)
    labels = jnp.asarray(case["in/labels"].astype(np.int32))

    def loss_of(params):
        tokens, _ = encoder.apply({"params": params["encoder"]}, images)
        logits, updated = head.apply(
            {"params": params["head"], "batch_stats": statistics},
            tokens,
            train=True,
            mutable=["batch_stats"],
        )
        return cross_entropy(logits, labels), (logits, updated["batch_stats"], tokens)

    (loss, (logits, after, tokens)), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
        params
    )
    assert_close(logits, case["out/logits"], "logits")
    assert_close(loss, case["out/loss"], "loss")
    for key, ours in STATISTICS.items():
        assert_close(after["classifier"][ours], case[f"out/after_{key}"], key)
    evaluated = head.apply({"params": params["head"], "batch_stats": after}, tokens, train=False)
    assert_close(evaluated, case["out/logits_eval"], "evaluation logits")
    ours = table.save(jax.device_get(gradient))
    golden = case.group("grad")
    assert set(golden) == {rule.key for rule in table.rules}
    largest = max(float(np.abs(value).max()) for value in golden.values())
    for key, value in golden.items():
        if key in SHIFTS:
            assert np.abs([ours[key], value]).max() < 1e-5 * largest, key
        else:
            assert_gradient_close(ours[key], value, key)
    again = table.save(params)
    for rule in table.rules:
        np.testing.assert_array_equal(again[rule.key], case[f"param/{rule.key}"])


def test_the_probe_of_a_method_has_this_head_with_the_official_batch_norm():
    head = AttentiveProbe(None, 7).head
    assert isinstance(head, AttentiveHead) and head.num_classes == 7
    norm = ProbeHead(7, epsilon=1e-5)
    assert norm.momentum == 0.9  # PyTorch's 0.1
