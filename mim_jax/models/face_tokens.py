"""Feature masked autoencoder: tokens from one vector (Vec2Face, Wu et al., ICLR 2025)."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.masking import NestedMasking, gather_tokens, restore_tokens
from mim_jax.models.transformer import Transformer, dropout, layer_norm

SMALL = nn.initializers.normal(0.02)
"""Start of both tables of positions."""

PATCH = 16
"""Side of the patches of the embedding that no forward pass uses."""


class FaceTokens(NamedTuple):
    """What one forward pass computes; the first token is always the projected vector.

    Attributes:
        target: `[batch, 1 + tokens, width]`, the tokens before masking, without gradient.
        latent: `[batch, 1 + kept, width]`, normalized encoder output of the tokens that are left.
        logits: `[batch, 1 + tokens, width]`, the decoder's prediction of the target.
    """

    target: jax.Array
    latent: jax.Array
    logits: jax.Array


class FeatureMaskedAutoencoder(nn.Module):
    """Spreads a vector over a grid of tokens, masks most of them, and predicts them all.

    With f the projected vector, token j is `w_j * f + b_j` with learned scalars. A masked token is
    replaced by f, and some of the masked ones are dropped. The decoder sees the encoder's output
    for the tokens that are not masked, and its output for f everywhere else.

    The official class has two layers that it never calls; their weights are kept here, so that its
    checkpoints come back as they were.

    Attributes:
        grid: rows and columns of tokens.
        width: of every token.
        encoder: blocks of the encoder.
        decoder: blocks of the decoder.
        dropout: rate after the embedding; see `Transformer` for when it applies.
        channels: of the image; only the unused patch embedding has them.
    """

    grid: tuple[int, int]
    width: int
    encoder: Transformer
    decoder: Transformer
    dropout: float = 0.1
    channels: int = 3

    @property
    def tokens(self) -> int:
        """Number of tokens, without that of the vector itself."""
        return math.prod(self.grid)

    @property
    def dtype(self) -> Any:
        """Compute type of everything."""
        return self.encoder.dtype

    @nn.compact
    def __call__(self, vectors: jax.Array, masking: NestedMasking | None = None) -> FaceTokens:
        """Predicts the tokens of vectors `[batch, size]`.

        Args:
            vectors: one for each image.
            masking: of the tokens beside f; None masks none, and then only the target and the
                latent mean anything.
        """
        xavier, dtype, width = nn.initializers.xavier_uniform(), self.dtype, self.width
        length = 1 + self.tokens

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, kernel_init=xavier, dtype=dtype, name=name)

        vector = dense(width, "projection")(vectors)[:, None]  # [B, 1, D]
        tokens = dense(self.tokens, "spread")(vector.swapaxes(1, 2)).swapaxes(1, 2)  # [B, T, D]
        target = jax.lax.stop_gradient(jnp.concatenate([vector, tokens], axis=1))
        if masking is not None:
            tokens = jnp.where(masking.mask[..., None] > 0, vector, tokens)
        x = jnp.concatenate([vector, tokens], axis=1)
        x = x + self.param("positions", SMALL, (length, width)).astype(dtype)
        x = dropout(self.dropout, self)(layer_norm("embed_norm", dtype)(x))
        if masking is not None:
            x = jnp.concatenate([x[:, :1], gather_tokens(x[:, 1:], masking.keep_ids)], axis=1)
        x, _ = self.encoder(x)
        latent = layer_norm("norm", dtype)(x)

        x = dense(width, "decoder_embed")(latent)
        if masking is not None:
            first, rest = x[:, :1], restore_tokens(x[:, 1:], x[:, :1], masking.restore_ids)
            x = jnp.concatenate([first, jnp.where(masking.mask[..., None] > 0, first, rest)], 1)
        x = x + self.param("decoder_positions", SMALL, (length, width)).astype(dtype)
        x, _ = self.decoder(x)
        logits = layer_norm("decoder_norm", dtype)(x)
        self._unused()
        return FaceTokens(target, latent, logits)

    def _unused(self) -> None:
        """Parameters of the official class's layers that nothing calls."""
        if self.is_initializing():
            images = jnp.zeros((1, PATCH, PATCH, self.channels))
            nn.Conv(self.width, (PATCH, PATCH), padding="VALID", name="unused_patch_embed")(images)
            nn.Dense(self.tokens, name="unused_center_token")(jnp.zeros((1, self.width)))
