"""A method whose features are cheap, with one parameter and one mutable collection."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mim_jax import config as configs
from mim_jax.method import Aux, Features, Input, Method


@dataclasses.dataclass(frozen=True)
class Toy(Method):
    """Projects patches of 7 x 7 pixels; pooled is their maximum, so it differs from the mean."""

    width: int = 16
    size: int = 28

    traces: ClassVar[list[str]] = []

    @classmethod
    def build(cls, config):
        return cls()

    @property
    def inputs(self):
        return {"image": Input((self.size, self.size, 1))}

    def init(self, rng, batch):
        kernel = jax.random.normal(rng, (49, self.width)) / 7
        return {"params": {"projection": kernel}, "batch_stats": {"shift": jnp.full(16, 0.1)}}

    def loss(self, variables, batch, rngs, step):
        return jnp.mean(self.features(variables, batch).pooled ** 2), Aux()

    def features(self, variables, batch):
        Toy.traces.append("features")
        side = self.size // 7
        images = batch["image"].reshape(-1, side, 7, side, 7).swapaxes(2, 3)
        patches = images.reshape(-1, side * side, 49)
        tokens = jnp.tanh(patches @ variables["params"]["projection"])
        tokens = tokens + variables["batch_stats"]["shift"]
        pooled = jnp.concatenate([tokens.max(1), tokens.reshape(len(tokens), -1)], axis=-1)
        return Features(pooled, tokens, (side, side))


@dataclasses.dataclass(frozen=True)
class ToyClassifier(Toy):
    """A toy whose mean tokens are logits of the ten classes."""

    def logits(self, variables, images):
        return self.features(variables, {"image": images}).tokens.mean(axis=1)[:, :10]

    def scores(self, variables, batch):
        return jax.nn.sigmoid(self.logits(variables, batch["image"])[:, 0])


def toy_variables(seed: int = 0):
    return Toy().init(jax.random.key(seed), {"image": jnp.zeros((1, 28, 28, 1))})


def toy_config(**changes):
    """The tiny config on a few embedded images; 300 and 90 do not fill batches of 64."""
    fields = {
        "evaluate.train_split": "train[:300]",
        "evaluate.test_split": "test[:90]",
        "evaluate.batch_size": 64,
        "compute_dtype": "float32",
    }
    return configs.load("mae:tiny", {**fields, **changes})
