"""A generator without weights: a vector is what the colours of its image are."""

import dataclasses

import jax
import jax.numpy as jnp

SIZE = 12


@dataclasses.dataclass(frozen=True)
class Stub:
    """Images of 2 x 2 pixels, squashed vectors; the face model gives the vectors back."""

    def generate(self, variables, vectors, rng):
        noise = variables["noise"] * jax.random.normal(rng, vectors.shape)
        return jnp.tanh((vectors + noise) / 4).reshape(-1, 2, 2, 3)

    def face_features(self, variables, images):
        return 4 * jnp.arctanh(jnp.clip(images.reshape(len(images), SIZE), -0.99, 0.99))


VARIABLES = {"noise": jnp.full((), 0.01)}
