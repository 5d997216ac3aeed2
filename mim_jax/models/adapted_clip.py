"""CLIP's image tower with experts and domain norms in every block (GM-DF, Lai et al., 2025).

The parameters of CLIP have the paths that they have in a `Tower`, and those of the adaptation lie
among them, so that a checkpoint of CLIP fills the tower and leaves the rest as it is.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.experts import DomainNorm, Experts
from mim_jax.models.transformer import (
    REMAT_POLICIES,
    Attention,
    Mlp,
    Transformer,
    attention_weights,
    layer_norm,
)
from mim_jax.models.vit import ViT

SITES = ("output", "pre")
"""Where domain norms are: on what the experts give, or in place of both LayerNorms of a block."""

MODES = ("sum", "delta")
"""What a domain norm at the output normalizes: MLP and experts together, or the experts alone."""

ADAPTATION = (
    r"mask_token$",
    r"transformer/blocks_\d+/(experts|domain_norm)/",
    r"transformer/blocks_\d+/norm[12]/\w+_of_domain/",
)
"""Patterns of the parameters below an `AdaptedViT` that CLIP does not have."""

EXPERTS = r"transformer/blocks_\d+/experts/experts/"
"""Pattern of the parameters of the experts themselves, without their gate."""

_SMALL_SCALE = 0.1  # of a norm of the experts alone, so that pre-trained features survive


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What is added to every block.

    Attributes:
        experts: number of experts beside the MLP; 0 for none.
        hidden: width between the two layers of an expert.
        gate: see `Experts`.
        site: one of `SITES`. Without experts there is no norm at the output.
        mode: one of `MODES`; without a meaning at the site "pre".
        layers: blocks, counted from 0, whose MLP branch is followed to the class token through
            the attention of later ones: the second-order features.
    """

    experts: int = 3
    hidden: int = 3072
    gate: str = "none"
    site: str = "output"
    mode: str = "delta"
    layers: tuple[int, ...] = (8, 9, 10)


class ReadingAttention(Attention):
    """Self-attention that also tells what the class token would read from other tokens."""

    @nn.compact
    def __call__(  # type: ignore[override]
        self, x: jax.Array, streams: Sequence[jax.Array] = ()
    ) -> tuple[jax.Array, jax.Array]:
        """The output for `x`, and what the class token reads from each stream.

        Args:
            x: `[batch, tokens, width]`, class token first.
            streams: tokens of the same shape.

        Returns:
            `[batch, tokens, width]`, and `[streams, batch, width]`: with the probabilities a of
            the class token's row, the sum over heads and tokens of `a W_out W_value stream`,
            without biases (equations 7 and 8).
        """
        width = x.shape[-1]
        query, key, value = self.projected(x)
        attended = jax.nn.dot_product_attention(
            query, key, value, implementation=self.implementation
        )
        output = self.merged(attended, width)
        if not streams:
            return output, jnp.zeros((0, x.shape[0], width), x.dtype)
        row = attention_weights(query[:, :1], key)[:, :, 0].astype(x.dtype)  # [B, H, T]
        kernels = self.variables["params"]
        to_value = kernels["qkv"]["kernel"][:, 2].astype(x.dtype)  # [D, H, D / H]
        to_output = kernels["out"]["kernel"].astype(x.dtype)  # [H, D / H, D]
        # Tokens are summed first: the maps are linear, so they see one vector for each head.
        read = jnp.einsum("bht,sbtd->sbhd", row, jnp.stack(streams))
        read = jnp.einsum("sbhd,dhe->sbhe", read, to_value)
        return output, jnp.einsum("sbhe,hed->sbd", read, to_output)


class AdaptedBlock(nn.Module):
    """A block of CLIP with experts beside its MLP.

    Attributes:
        transformer: fields of the block.
        adaptation: what is added.
    """

    transformer: Transformer
    adaptation: Adaptation

    @nn.compact
    def __call__(
        self, x: jax.Array, condition: jax.Array, streams: Sequence[jax.Array] = ()
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Tokens after the block, and what else it tells.

        Args:
            x: `[batch, tokens, width]`, class token first.
            condition: `[batch, domain width]`, the embedding of each image's domain.
            streams: see `ReadingAttention`.

        Returns:
            The tokens; what the MLP's branch has added to them; what the class token reads from
            the streams; and the attention over experts `[batch, tokens, N, N]`.
        """
        settings, adaptation = self.transformer, self.adaptation
        dtype = settings.dtype

        def normalized(name: str, x: jax.Array) -> jax.Array:
            if adaptation.site == "pre":
                norm = DomainNorm(settings.epsilon, deviation=0.0, dtype=dtype, name=name)
                return norm(x, condition)
            return layer_norm(name, dtype, settings.epsilon)(x)

        attention = ReadingAttention(
            settings.heads, dtype, settings.attention, settings.qkv_bias, name="attention"
        )
        branch, read = attention(normalized("norm1", x), streams)
        x = x + branch
        hidden = normalized("norm2", x)
        added = Mlp(settings.mlp_ratio, dtype, settings.activation, name="mlp")(hidden)
        routes = jnp.zeros((*x.shape[:2], 0, 0), jnp.float32)
        if adaptation.experts:
            experts = Experts(
                adaptation.experts,
                adaptation.hidden,
                adaptation.gate,
                # At the site "pre" nothing else keeps the block that of CLIP at the start.
                zero_start=adaptation.site == "pre",
                dtype=dtype,
                name="experts",
            )
            special, routes = experts(hidden, condition)
            small = adaptation.mode == "delta"
            norm = DomainNorm(scale=_SMALL_SCALE if small else 1.0, dtype=dtype, name="domain_norm")
            if adaptation.site == "pre":
                added = added + special
            elif small:
                added = added + norm(special, condition)
            else:
                added = norm(added + special, condition)
        return x + added, added, read, routes


class Adapted(NamedTuple):
    """What the adapted tower makes of images.

    Attributes:
        tokens: `[batch, 1 + patches, width]` after the last block, class token first.
        normalized: the same after the final norm.
        second_order: `[layers, batch, width]`, what the class token reads of the MLP branch of
            some blocks through the attention of all later blocks.
        routes: attention over experts, `[batch, 1 + patches, N, N]` of every block.
    """

    tokens: jax.Array
    normalized: jax.Array
    second_order: jax.Array
    routes: list[jax.Array]


class AdaptedTransformer(Transformer):
    """A stack of `AdaptedBlock`.

    Attributes:
        adaptation: what is added to every block.
    """

    adaptation: Adaptation = Adaptation()

    @nn.compact
    def __call__(  # type: ignore[override]
        self, x: jax.Array, condition: jax.Array, layers: Sequence[int] = ()
    ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        """Tokens after the last block, second-order features and attention over experts.

        Args:
            x: `[batch, tokens, width]`, class token first.
            condition: `[batch, domain width]`.
            layers: blocks that have a second-order feature, see `Adapted`.

        Raises:
            ValueError: for an unknown name in `remat`.
        """
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}; known are {', '.join(REMAT_POLICIES)}.")
        block: Any = AdaptedBlock
        if self.remat != "none":
            block = nn.remat(AdaptedBlock, policy=REMAT_POLICIES[self.remat])
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(Transformer)
            if field.name not in ("parent", "name")
        }
        settings = Transformer(**fields, parent=None)
        streams: list[jax.Array] = []
        features: list[jax.Array] = []
        routes = []
        for i in range(self.depth):
            one = block(settings, self.adaptation, name=f"blocks_{i}")
            x, added, read, route = one(x, condition, tuple(streams))
            features = [feature + part for feature, part in zip(features, read)]
            routes.append(route)
            if i in layers:
                streams.append(added)
                features.append(jnp.zeros_like(x[:, 0]))
        empty = jnp.zeros((0, x.shape[0], x.shape[-1]), x.dtype)
        return x, jnp.stack(features) if features else empty, routes


class AdaptedViT(ViT):
    """A ViT whose blocks are an `AdaptedTransformer`, with a token for masked patches."""

    @nn.compact
    def __call__(  # type: ignore[override]
        self,
        images: jax.Array,
        condition: jax.Array,
        mask: jax.Array | None = None,
        second_order: bool = True,
    ) -> Adapted:
        """Encodes images of known domains.

        Args:
            images: `[batch, height, width, channels]`, normalized.
            condition: `[batch, domain width]`.
            mask: `[batch, patches]`, 1 where the mask token takes the place of a patch behind the
                patch embedding; None for nowhere.
            second_order: compute what `Adapted.second_order` has; else it is empty.

        Raises:
            ValueError: if the images do not have the size and channels of the model.
        """
        blocks = self.transformer
        assert isinstance(blocks, AdaptedTransformer)
        mask_token = self.param("mask_token", nn.initializers.normal(0.02), (self.width,))
        tokens = self.embedded(images, mask=mask, mask_token=mask_token)
        layers = blocks.adaptation.layers if second_order else ()
        tokens, features, routes = blocks(tokens, condition, layers)
        epsilon = self.norm_epsilon or blocks.epsilon
        normalized = layer_norm("norm", blocks.dtype, epsilon)(tokens)
        return Adapted(tokens, normalized, features, routes)


def adapted(encoder: ViT, adaptation: Adaptation, **blocks: Any) -> AdaptedViT:
    """An `AdaptedViT` of the sizes of CLIP's ViT.

    Args:
        encoder: the ViT.
        adaptation: what is added to its blocks.
        **blocks: other fields of its `Transformer`.

    Raises:
        ValueError: if there is no block of a number in `adaptation.layers`.
    """
    depth = encoder.transformer.depth
    if not all(0 <= layer < depth for layer in adaptation.layers):
        raise ValueError(
            f"second-order features are of the blocks {adaptation.layers}, counted from 0, but "
            f"the tower has {depth}."
        )

    def fields(module: nn.Module) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(module)]
        return {name: getattr(module, name) for name in names if name not in ("parent", "name")}

    inner = {**fields(encoder.transformer), **blocks, "scan": False}
    transformer = AdaptedTransformer(**inner, adaptation=adaptation)
    return AdaptedViT(**{**fields(encoder), "transformer": transformer})


class AdaptedTower(nn.Module):
    """The adapted encoder beside CLIP's own projection, which is kept but trains nothing.

    Attributes:
        encoder: the adapted ViT.
        outputs: width of CLIP's space of images and texts.
    """

    encoder: AdaptedViT
    outputs: int

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        condition: jax.Array,
        mask: jax.Array | None = None,
        second_order: bool = True,
    ) -> tuple[Adapted, jax.Array]:
        """See `AdaptedViT`; and CLIP's image feature `[batch, outputs]` of the adapted tower."""
        seen = self.encoder(images, condition, mask, second_order)
        dtype = self.encoder.transformer.dtype
        project = nn.Dense(self.outputs, use_bias=False, dtype=dtype, name="projection")
        return seen, project(seen.normalized[:, 0])


class Fusion(nn.Module):
    """One feature of an image from the class token and the second-order features (equation 8).

    `projection(z + sum over layers of alpha_l LN_l(so_l))`.

    Attributes:
        outputs: width of the result.
        dtype: compute type.
    """

    outputs: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, class_token: jax.Array, second_order: jax.Array) -> jax.Array:
        """`[batch, width]` and `[layers, batch, width]` -> `[batch, outputs]`."""
        layers = len(second_order)
        fused = class_token
        if layers:
            alpha = self.param("alpha", nn.initializers.constant(0.1), (layers,))
        for i in range(layers):
            normalized = layer_norm(f"norm_{i}", self.dtype)(second_order[i])
            fused = fused + alpha[i].astype(self.dtype) * normalized
        return nn.Dense(self.outputs, dtype=self.dtype, name="projection")(fused)


class PatchDecoder(nn.Module):
    """Predicts the values of all patches from the tokens of a masked pass.

    Attributes:
        patches: number of patches.
        outputs: values of a patch.
        width: token width.
        transformer: the blocks.
    """

    patches: int
    outputs: int
    width: int
    transformer: Transformer

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[batch, 1 + patches, any]`, class token first -> `[batch, patches, outputs]`."""
        dtype, xavier = self.transformer.dtype, nn.initializers.xavier_uniform()
        shape = (1 + self.patches, self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), shape)
        x = nn.Dense(self.width, kernel_init=xavier, dtype=dtype, name="embed")(tokens)
        x, _ = self.transformer(x + positions.astype(dtype))
        x = layer_norm("norm", dtype)(x[:, 1:])
        return nn.Dense(self.outputs, kernel_init=xavier, dtype=dtype, name="pred")(x)


def is_expert(path: str) -> bool:
    """Whether a parameter belongs to an expert, and so to the inner step of meta-learning."""
    return re.search(EXPERTS, path) is not None
