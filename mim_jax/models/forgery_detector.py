"""A detector of forged images in several domains, on an adapted CLIP (GM-DF, Lai et al., 2025)."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mim_jax.models.adapted_clip import Adapted, AdaptedTower, Fusion, PatchDecoder
from mim_jax.models.text import TextTower

UNSEEN = -1
"""Number of a domain that the model was not trained on."""


class Detected(NamedTuple):
    """What the detector sees in images.

    Attributes:
        feature: v, float32 `[batch, outputs]`.
        class_token: z, `[batch, width]`, after the final norm.
        logit: of the head, float32 `[batch]`; positive for fake.
        seen: tokens, second-order features and attention over experts.
    """

    feature: jax.Array
    class_token: jax.Array
    logit: jax.Array
    seen: Adapted


class ForgeryDetector(nn.Module):
    """The adapted CLIP, with a head, learned prompts and a decoder of masked patches.

    Attributes:
        visual: image tower.
        text: text tower.
        fusion: from class token and second-order features to one feature.
        decoder: of masked patches.
        domains: number of training domains.
        domain_width: of the embedding that sets the norms.
        prompt: token ids of a prompt, before and behind the learned tokens of domain and class.
    """

    visual: AdaptedTower
    text: TextTower
    fusion: Fusion
    decoder: PatchDecoder
    domains: int
    domain_width: int
    prompt: tuple[tuple[int, ...], tuple[int, ...]]

    def setup(self) -> None:
        """Parameters of domains and classes, and of the head."""
        normal, width = nn.initializers.normal(0.02), self.text.width
        self.domain_embedding = self.param(
            "domain_embedding", normal, (self.domains, self.domain_width)
        )
        # The last row speaks of any domain that training has not seen.
        self.domain_tokens = self.param("domain_tokens", normal, (self.domains + 1, width))
        self.class_tokens = self.param("class_tokens", normal, (2, width))
        # CLIP's own, as all released ones have it; kept for its checkpoints alone.
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(100)), ())
        self.head = nn.Dense(1)

    def __call__(self, images: jax.Array, domain: jax.Array, mask: jax.Array) -> jax.Array:
        """Runs every part once, for their parameters; gives the reconstruction."""
        self.detect(images, domain)
        self.read()
        return self.reconstruct(images, domain, mask)

    def row(self, domain: jax.Array) -> jax.Array:
        """Where a domain is in a table with one more row for unseen ones, int32 `[batch]`."""
        return jnp.where((domain < 0) | (domain >= self.domains), self.domains, domain)

    def condition(self, domain: jax.Array) -> jax.Array:
        """c_d, `[batch, domain_width]`; of an unseen domain the mean of all."""
        table = self.domain_embedding
        return jnp.concatenate([table, table.mean(axis=0, keepdims=True)])[self.row(domain)]

    def detect(self, images: jax.Array, domain: jax.Array) -> Detected:
        """Looks at whole images `[batch, height, width, channels]` of domains `[batch]`."""
        seen, _ = self.visual(images, self.condition(domain))
        class_token = seen.normalized[:, 0]
        feature = self.fusion(class_token, seen.second_order).astype(jnp.float32)
        return Detected(feature, class_token, self.head(feature)[:, 0], seen)

    def read(self) -> jax.Array:
        """Text features of all prompts, float32 `[domains + 1, 2, outputs]`, not normalized.

        "A [domain] [class] face showing forgery clues" (equation 9), for real and fake.
        """
        domains, classes = self.domain_tokens, self.class_tokens
        shape = (len(domains), len(classes), domains.shape[1])
        pairs = [
            jnp.broadcast_to(x, shape).reshape(-1, shape[-1])
            for x in (domains[:, None], classes[None])
        ]
        before, after = self.prompt
        ids = jnp.broadcast_to(jnp.asarray([*before, *after]), (len(pairs[0]), len(before + after)))
        texts = self.text(ids, jnp.stack(pairs, axis=1), len(before))
        return texts.pooled.astype(jnp.float32).reshape(*shape[:2], -1)

    def reconstruct(self, images: jax.Array, domain: jax.Array, mask: jax.Array) -> jax.Array:
        """Predicts all patches, `[batch, patches, values]`, with some masked.

        Args:
            images: `[batch, height, width, channels]`.
            domain: int `[batch]`.
            mask: `[batch, patches]`, 1 where a patch is masked.
        """
        seen, _ = self.visual(images, self.condition(domain), mask, second_order=False)
        return self.decoder(seen.tokens)
