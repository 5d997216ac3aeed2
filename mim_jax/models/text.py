"""The text tower of CLIP (Radford et al., 2021, section 2.4): a causal Transformer."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.transformer import Transformer, layer_norm


class Read(NamedTuple):
    """What a text tower makes of token ids.

    Attributes:
        tokens: `[batch, length, width]`, after the final norm.
        blocks: outputs of all blocks, before the final norm, see `Transformer`.
        pooled: `[batch, outputs or width]`, of the end-of-text token, projected where the tower
            has a projection.
    """

    tokens: jax.Array
    blocks: Any
    pooled: jax.Array


class TextTower(nn.Module):
    """Token embedding, learned positions, causal blocks, a final norm and a projection.

    Attributes:
        vocabulary: number of token ids.
        length: most tokens of a text.
        width: token width.
        transformer: the blocks, with `causal`.
        outputs: width of a linear projection without bias; 0 for none.
        end_token: id of the token that ends a text; None takes the largest id of each text, as
            the end is in OpenAI's vocabulary.
    """

    vocabulary: int
    length: int
    width: int
    transformer: Transformer
    outputs: int = 0
    end_token: int | None = None

    @nn.compact
    def __call__(self, ids: jax.Array, inserted: jax.Array | None = None, place: int = 0) -> Read:
        """Reads texts.

        Args:
            ids: int `[batch, length]` or shorter; what comes after the first end-of-text token
                does not change what `pooled` says.
            inserted: `[batch, tokens, width]`, embeddings that come into the text as more tokens,
                such as learned ones; None for none. The end of the text lies behind them.
            place: how many tokens of the text are before them.

        Raises:
            ValueError: if the texts are longer than `length`, or the blocks not causal.
        """
        extra = 0 if inserted is None else inserted.shape[1]
        length = ids.shape[1] + extra
        if length > self.length:
            raise ValueError(
                f"texts have {length} tokens, but the tower reads {self.length}: cut them."
            )
        if not self.transformer.causal:
            raise ValueError("a text tower needs blocks that are causal.")
        blocks = self.transformer
        normal = nn.initializers.normal
        embedding = self.param("token_embedding", normal(0.02), (self.vocabulary, self.width))
        positions = self.param("positions", normal(0.01), (self.length, self.width))
        x = embedding[ids]
        if inserted is not None:
            x = jnp.concatenate([x[:, :place], inserted, x[:, place:]], axis=1)
        x, outputs = blocks((x + positions[:length]).astype(blocks.dtype))
        tokens = layer_norm("norm", blocks.dtype, blocks.epsilon)(x)
        # `argmax` gives the first of equal ones.
        end = jnp.argmax(ids if self.end_token is None else ids == self.end_token, axis=1) + extra
        pooled = jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0]
        if self.outputs:
            pooled = nn.Dense(self.outputs, use_bias=False, dtype=blocks.dtype, name="projection")(
                pooled
            )
        return Read(tokens, outputs, pooled)
