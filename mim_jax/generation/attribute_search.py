"""AttrOP: gradient descent on a vector for a face of some quality or pose (Vec2Face, 2025)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

Image = jax.Array

Generate = Callable[[jax.Array, jax.Array], Image]
"""From vectors `[batch, size]` and the number of the call (int32) to images in [-1, 1]."""

Penalty = Callable[[Image], jax.Array]
"""From images to how far an attribute is off, one number for each: `[batch]`."""

RATE = 0.1
"""Adam's learning rate."""

IDENTITY_WEIGHT = 100.0
"""Of the identity beside the attributes."""

QUALITY = 27.0
"""Wanted length of MagFace's vector."""


class Attribute(NamedTuple):
    """Something that images should have.

    Attributes:
        penalty: how far they are off.
        limit: a mean penalty up to which a step counts.
    """

    penalty: Penalty
    limit: float


class Terms(NamedTuple):
    """The losses of one step, before its update.

    Attributes:
        identity: mean of one minus the cosine.
        attributes: mean penalty of each attribute, `[attributes]`.
        total: what is minimized.
    """

    identity: jax.Array
    attributes: jax.Array
    total: jax.Array


@flax.struct.dataclass
class Search:
    """A search that is under way, or done.

    Attributes:
        vectors: `[batch, size]`.
        optimizer: state of Adam.
        steps: updates so far.
        counted: those of them that began within all limits.
        terms: losses before the last update.
        gradient: of the last update.
    """

    vectors: jax.Array
    optimizer: Any
    steps: jax.Array
    counted: jax.Array
    terms: Terms
    gradient: jax.Array


class AttributeSearch(NamedTuple):
    """Moves vectors until their images have what they should, and still show the same person.

    A step counts if the losses before its update are within all limits. The search ends after
    `counted_steps` of those, or after `max_steps` (without which the official code need not end).

    Attributes:
        generate: the generator.
        face_features: vectors of images, by the face model.
        attributes: what the images should have; see `quality` and `pose`.
        counted_steps: number of counted steps.
        max_steps: number of all steps.
        identity_limit: largest identity loss of a step that counts.
    """

    generate: Generate
    face_features: Callable[[Image], jax.Array]
    attributes: tuple[Attribute, ...]
    counted_steps: int = 1
    max_steps: int = 100
    identity_limit: float = 0.3

    def start(self, vectors: jax.Array) -> Search:
        """A search that has not moved yet."""
        zero, count = jnp.zeros((), vectors.dtype), jnp.zeros((), jnp.int32)
        terms = Terms(zero, jnp.zeros(len(self.attributes), vectors.dtype), zero)
        optimizer = optax.adam(RATE).init(vectors)
        return Search(vectors, optimizer, count, count, terms, jnp.zeros_like(vectors))

    def losses(self, vectors: jax.Array, identity: jax.Array, call: jax.Array) -> Terms:
        """The losses of vectors.

        Args:
            vectors: `[batch, size]`.
            identity: vectors of the people to be shown.
            call: number of the generator's call.
        """
        images = self.generate(vectors, call)
        distance = 1 - _cosine(self.face_features(images), identity)
        penalties = [jnp.mean(attribute.penalty(images)) for attribute in self.attributes]
        first = jnp.mean(distance).astype(vectors.dtype)
        others = jnp.array(penalties, vectors.dtype)
        return Terms(first, others, IDENTITY_WEIGHT * first + jnp.sum(others))

    def step(self, search: Search, identity: jax.Array) -> Search:
        """One update."""

        def total(vectors: jax.Array) -> tuple[jax.Array, Terms]:
            terms = self.losses(vectors, identity, search.steps)
            return terms.total, terms

        (_, terms), gradient = jax.value_and_grad(total, has_aux=True)(search.vectors)
        updates, optimizer = optax.adam(RATE).update(gradient, search.optimizer)
        limits = jnp.array([attribute.limit for attribute in self.attributes])
        within = (terms.identity <= self.identity_limit) & jnp.all(terms.attributes <= limits)
        return Search(
            optax.apply_updates(search.vectors, updates),
            optimizer,
            search.steps + 1,
            search.counted + within.astype(jnp.int32),
            terms,
            gradient,
        )

    def run(
        self, vectors: jax.Array, identity: jax.Array | None = None
    ) -> tuple[jax.Array, Image, Search]:
        """Searches from vectors `[batch, size]`.

        Args:
            vectors: where to begin.
            identity: vectors of the people to be shown; None for `vectors`.

        Returns:
            The vectors found, their images under a fresh call of the generator, and the search.
        """
        person = vectors if identity is None else identity

        def unfinished(search: Search) -> jax.Array:
            return (search.counted < self.counted_steps) & (search.steps < self.max_steps)

        search = jax.lax.while_loop(
            unfinished, lambda search: self.step(search, person), self.start(vectors)
        )
        return search.vectors, self.generate(search.vectors, search.steps), search


def quality(
    features: Callable[[Image], jax.Array], target: float = QUALITY, limit: float = 1.0
) -> Attribute:
    """Images of which MagFace's vectors are long, which it makes of good images.

    Args:
        features: the quality model.
        target: wanted length; more is as good.
        limit: see `Attribute`.
    """

    def penalty(images: Image) -> jax.Array:
        return jax.nn.relu(target - jnp.linalg.norm(features(images), axis=-1))

    return Attribute(penalty, limit)


def pose(yaw: Callable[[Image], jax.Array], target: float, limit: float = 5.0) -> Attribute:
    """Heads turned by an angle to either side.

    Args:
        yaw: angle of images in degrees, `[batch]`.
        target: wanted angle.
        limit: see `Attribute`.
    """
    return Attribute(lambda images: jnp.abs(target - jnp.abs(yaw(images))), limit)


def yaw_of_rotation(rotation: jax.Array) -> jax.Array:
    """Yaw in degrees of rotation matrices `[batch, 3, 3]`, as 6DRepNet's code takes it."""
    across = jnp.sqrt(rotation[:, 0, 0] ** 2 + rotation[:, 1, 0] ** 2)
    return jnp.rad2deg(jnp.arctan2(-rotation[:, 2, 0], across))


def _cosine(first: jax.Array, second: jax.Array) -> jax.Array:
    """Cosine of the angle between rows, in the type of the rows."""
    lengths = jnp.linalg.norm(first, axis=-1) * jnp.linalg.norm(second, axis=-1)
    return jnp.sum(first * second, axis=-1) / jnp.maximum(lengths, 1e-8)
