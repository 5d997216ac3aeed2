"""A method with a frozen tower: a linear map of the image learns what the tower sees in it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from mim_jax import config as configs
from mim_jax.method import Aux, Features, Input, Method, Pretrained, register
from mim_jax.models.tower import Tower, build_tower, see, tower_settings

SMALL = tower_settings(
    "tiny", size="tiny", width=16, depth=2, heads=2, patch_size=14, mean=(0.5,), std=(0.25,)
)


class Student(nn.Module):
    outputs: int

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.outputs)(images.reshape(len(images), -1))


@register("follower")
@dataclasses.dataclass(frozen=True)
class Follower(Method):
    teacher: Tower
    path: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def build(cls, config):
        teacher = build_tower(config.model.teacher, config.compute_dtype)
        data = config.data
        return cls(teacher, config.model.teacher.path, tuple(data.mean), tuple(data.std))

    @property
    def student(self):
        return Student(self.teacher.encoder.width)

    @property
    def frozen(self):
        return ("teacher/",)

    @property
    def pretrained(self):
        return (Pretrained("teacher", self.teacher, self.path),)

    @property
    def inputs(self):
        return {"image": Input((28, 28, 1))}

    def init(self, rng, batch):
        images = jnp.zeros((1, *batch["image"].shape[1:]))
        own = self.teacher.inputs(images, self.mean, self.std)
        return {
            "params": {
                "student": self.student.init(rng, images)["params"],
                "teacher": self.teacher.init(rng, own)["params"],
            }
        }

    def loss(self, variables, batch, rngs, step):
        params, images = variables["params"], batch["image"]
        target = see(
            self.teacher, params["teacher"], self.teacher.inputs(images, self.mean, self.std)
        )
        ours = self.student.apply({"params": params["student"]}, images)
        return jnp.mean((ours - target.pooled.astype(jnp.float32)) ** 2), Aux()

    def features(self, variables, batch):
        ours = self.student.apply({"params": variables["params"]["student"]}, batch["image"])
        return Features(ours, ours[:, None], (1,))


def follower_config(path: str = "", **changes) -> ml_collections.ConfigDict:
    config = configs.complete(
        ml_collections.ConfigDict(
            dict(
                method="follower",
                model=dict(teacher={**SMALL, "path": path}),
                data=dict(
                    source="embedded",
                    split="train[:64]",
                    image_size=(28, 28),
                    channels=1,
                    mean=(0.2861,),
                    std=(0.3530,),
                ),
                compute_dtype="float32",
                batch_size=16,
                steps=2,
                schedule=dict(warmup_epochs=0.0),
                log=dict(every_steps=1, tensorboard=False),
            )
        )
    )
    configs.override(config, changes)
    return config


def random_tower(settings=SMALL, seed: int = 0):
    """A tower, and parameters none of which is zero."""
    import numpy as np

    tower = build_tower(ml_collections.ConfigDict(settings), "float32")
    encoder = tower.encoder
    images = jnp.zeros((1, *encoder.image_size, encoder.channels))
    shapes = jax.eval_shape(tower.init, jax.random.key(0), images)["params"]
    random = np.random.default_rng(seed)
    return tower, jax.tree.map(
        lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32), shapes
    )
