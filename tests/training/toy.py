"""A method with one of everything: frozen part, EMA, mutable collection, two optimizer groups."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from mim_jax.method import Aux, Ema, Features, Group, Input, Method

WIDTH = 6


class Student(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH, name="first")(x)


class Net(nn.Module):
    """student and teacher (its EMA), a frozen projection, a critic, and a running mean."""

    def setup(self):
        self.student = Student()
        self.teacher = Student()
        self.projection = nn.Dense(WIDTH)
        self.critic = nn.Dense(1)
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, (WIDTH,))

    def __call__(self, x):
        student = self.student(self.projection(x))
        teacher = jax.lax.stop_gradient(self.teacher(x))
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            self.mean.value = 0.9 * self.mean.value + 0.1 * student.mean(0)
        return student, teacher, self.critic(jax.lax.stop_gradient(student))


@dataclasses.dataclass(frozen=True)
class Toy(Method):
    noise: float = 0.0

    net: ClassVar[Net] = Net()
    streams: ClassVar[tuple[str, ...]] = ("noise",)
    frozen: ClassVar[tuple[str, ...]] = ("projection/",)
    ema: ClassVar[tuple[Ema, ...]] = (
        Ema("student", "teacher", lambda step: jnp.where(step < 100, 0.9, 1.0)),
    )
    groups: ClassVar[tuple[Group, ...]] = (Group("critic", r"^critic/", {"lr": 0.5}),)

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "Toy":
        return cls(config.model.get("noise", 0.0))

    @property
    def inputs(self):
        return {"image": Input((WIDTH,))}

    def init(self, rng, batch):
        return self.net.init(rng, jnp.zeros((1, WIDTH)))

    def loss(self, variables, batch, rngs, step):
        x = batch["image"]
        x = x + self.noise * jax.random.normal(rngs["noise"], x.shape)
        (student, teacher, score), mutable = self.net.apply(variables, x, mutable=["batch_stats"])
        match = jnp.mean((student - teacher - 1) ** 2)
        critic = jnp.mean((score - x[:, :1]) ** 2)
        return match + critic, Aux({"match": match, "critic": critic}, mutable)

    def features(self, variables, batch):
        student, _, _ = self.net.apply(variables, batch["image"])
        return Features(student, student[:, None], (1,))
