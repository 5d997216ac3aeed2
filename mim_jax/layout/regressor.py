"""The latent contextual regressor in the official names of CAE."""

from typing import Any

import numpy as np

from mim_jax.layout import Constant, Rule, layer_norm_rules, linear, linear_rules, reshape


def regressor_rules(key: str, path: str, regressor: Any) -> tuple[list[Rule], list[Constant]]:
    """Rules of a `LatentRegressor`, and its layer scales where they are fixed ones.

    Args:
        key: official prefix.
        path: of our module.
        regressor: the `LatentRegressor` itself.
    """
    blocks, width = regressor.settings, regressor.width
    heads = (blocks.heads, blocks.head_width or width // blocks.heads)
    rules = list(layer_norm_rules(f"{key}.norm", f"{path}/norm"))
    ones = []
    for i in range(blocks.depth):
        official, ours = f"{key}.regressor_blocks.{i}", f"{path}/blocks_{i}"
        for theirs, name in (
            ("norm1_q", "query_norm"),
            ("norm1_k", "key_norm"),
            ("norm1_v", "value_norm"),
            ("norm2_cross", "norm"),
        ):
            rules += layer_norm_rules(f"{official}.{theirs}", f"{ours}/{name}")
        attention, inside = f"{official}.cross_attn", f"{ours}/attention"
        for theirs, name in (("q", "query"), ("k", "key"), ("v", "value")):
            split = linear(outputs=heads)
            rules.append(Rule(f"{attention}.{theirs}.weight", f"{inside}/{name}/kernel", split))
        for theirs, name in (("q", "query"), ("v", "value")):
            per_head = reshape(heads, (-1,))
            rules.append(Rule(f"{attention}.{theirs}_bias", f"{inside}/{name}_bias", per_head))
        joined = linear(inputs=heads)
        rules.append(Rule(f"{attention}.proj.weight", f"{inside}/out/kernel", joined))
        rules.append(Rule(f"{attention}.proj.bias", f"{inside}/out/bias"))
        for name in ("fc1", "fc2"):
            rules += linear_rules(f"{official}.mlp_cross.{name}", f"{ours}/mlp/{name}")
        for which in (1, 2):
            gamma = f"{official}.gamma_{which}_cross"
            if blocks.layer_scale is None:
                ones.append(Constant(gamma, np.ones(width, np.float32)))
            else:
                rules.append(Rule(gamma, f"{ours}/layer_scale{which}/scale"))
    return rules, ones
