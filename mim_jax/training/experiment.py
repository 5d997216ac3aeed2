"""What a config describes, ready to run: method, mesh, optimizer, initial state, compiled step."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mim_jax import config as configs
from mim_jax.data import (
    RandomResizedCrop,
    Source,
    steps_per_epoch,
    train_batches,
)
from mim_jax.data.color_jitter import ColorJitter
from mim_jax.data.domains import domain_order
from mim_jax.data.keep_ratio_crop import KeepRatioCrop
from mim_jax.data.on_device import normalize, random_flip
from mim_jax.data.order import ShuffledOrder
from mim_jax.data.pipeline import Batches, OrderOf, TrainTransform, views_of
from mim_jax.data.rand_augment import Composed, RandAugment
from mim_jax.data.table import TableSource
from mim_jax.data.table_views import table_views
from mim_jax.data.transforms import CropWithTarget
from mim_jax.data.volumes import volume_crops
from mim_jax.method import Batch, Method, method_class
from mim_jax.training import sharding, step
from mim_jax.training.flops import count_flops
from mim_jax.training.optimizer import Schedule, build_optimizer, build_schedules
from mim_jax.training.state import TrainState, init_state
from mim_jax.training.tree import map_with_path

HostShapes = Mapping[str, Any]

PICTURES = ("image", "target_image")
"""Batch entries that hold samples of 8 or 16 bits."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run before its first step.

    Attributes:
        config: complete, with values that depend on the machine filled in.
        method: what is trained.
        mesh: devices.
        rules: sharding rules, the user's first.
        optimizer: over the trainable parameters.
        schedules: learning rate by optimizer group.
        steps_per_epoch: optimizer steps in an epoch.
        total_steps: optimizer steps in the run.
    """

    config: ml_collections.ConfigDict
    method: Method
    mesh: Mesh
    rules: tuple[sharding.Rule, ...]
    optimizer: optax.GradientTransformationExtraArgs
    schedules: dict[str, Schedule]
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def build(
        cls,
        config: ml_collections.ConfigDict,
        examples: int,
        devices: Sequence[jax.Device] | None = None,
    ) -> "Experiment":
        """Builds everything that can be built without data.

        Args:
            config: a complete config.
            examples: number of training examples, or of all their views, see `training_rows`.
            devices: devices to use; all by default.

        Raises:
            ValueError: for anything in the config that does not fit together.
        """
        config = configs.resolve(config, jax.default_backend())
        method = method_class(config.method).build(config)
        mesh = sharding.make_mesh(config.mesh, devices)
        sharding.check_batch_size(config.batch_size, config.accumulate, mesh)
        per_epoch = steps_per_epoch(examples, config.batch_size)
        total = config.steps or round(config.epochs * per_epoch)
        schedules = build_schedules(config, method.groups, per_epoch, total)
        return cls(
            config=config,
            method=method,
            mesh=mesh,
            rules=sharding.rules_of(config.sharding),
            optimizer=build_optimizer(
                config.optimizer,
                method.groups,
                schedules,
                no_decay=method.no_decay,
                rate_scale=method.rate_scale,
            ),
            schedules=schedules,
            steps_per_epoch=per_epoch,
            total_steps=total,
        )

    @classmethod
    def without_data(
        cls, config: ml_collections.ConfigDict, devices: Sequence[jax.Device] | None = None
    ) -> "Experiment":
        """An experiment for its model and state alone; its schedules mean nothing."""
        config = config.copy_and_resolve_references()
        config.update(steps=0, epochs=math.ceil(config.schedule.warmup_epochs + 1.0) + 0.0)
        return cls.build(config, examples=config.batch_size, devices=devices)

    @classmethod
    def on_one_device(cls, config: ml_collections.ConfigDict) -> "Experiment":
        """`without_data` on the first device, whatever mesh the config was trained on."""
        config = config.copy_and_resolve_references()
        config.update(mesh=dict(data=1, fsdp=1, tensor=1), accumulate=1)
        return cls.without_data(config, jax.devices()[:1])

    def batch_shapes(self) -> dict[str, np.ndarray]:
        """A batch of zeros without memory of its own, where no data are at hand."""
        rows = self.config.batch_size
        samples = np.uint16 if self.config.data.bits == 16 else np.uint8
        kinds = {"float": np.float32, "int": np.int32}
        return {
            name: np.broadcast_to(
                np.zeros((), samples if name in PICTURES else kinds[wanted.dtype]),
                (rows, *(size or 1 for size in wanted.shape)),
            )
            for name, wanted in self.method.inputs.items()
        }

    def prepare(self, batch: Batch, rng: jax.Array) -> Batch:
        """What the step does first: flips, and normalizes integer images to float32.

        A `target_image` is flipped where its `image` is, and scaled to [0, 1]; what else the
        network that reads it expects, the method applies.
        """
        if not self.config.data.flip:
            return self.normalized(batch)
        images = {name: random_flip(rng, batch[name]) for name in PICTURES if name in batch}
        return self.normalized({**batch, **images})

    def gathered(self, params: Any) -> Any:
        """Parameters as the loss computes with them: whole along `fsdp`, whose devices have rows.

        Without it XLA would rather cut the activations as the parameters are cut, and exchange
        those, which takes many times as long.
        """

        def whole(path: str, leaf: jax.Array) -> jax.Array:
            spec = sharding.partition_spec(f"params/{path}", leaf.shape, self.rules, self.mesh)
            spec = PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

        return map_with_path(whole, params)

    def normalized(self, batch: Batch) -> Batch:
        """`prepare` without anything random."""
        data = self.config.data
        statistics = {"image": (data.mean, data.std), "target_image": ((0.0,), (1.0,))}
        return {
            name: normalize(array, *statistics[name]) if name in statistics else array
            for name, array in batch.items()
        }

    def _initial(self, shapes: HostShapes) -> TrainState:
        batch = {
            name: jnp.zeros((1, *array.shape[1:]), array.dtype) for name, array in shapes.items()
        }
        return init_state(self.method, self.optimizer, jax.random.key(self.config.seed), batch)

    def abstract_state(self, shapes: HostShapes) -> TrainState:
        """Shapes, types and shardings of the state.

        Args:
            shapes: arrays (or shapes) of one host batch.
        """
        state = jax.eval_shape(lambda: self._initial(shapes))
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            state,
            sharding.state_shardings(state, self.rules, self.mesh),
        )

    def initial_state(self, shapes: HostShapes) -> TrainState:
        """The state at step 0, created where it will live."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state(shapes))
        return jax.jit(lambda: self._initial(shapes), out_shardings=where)()

    def gradient(self) -> step.Gradient:
        """The gradient of a step alone, not yet compiled."""
        return step.make_gradient(
            self.method,
            self.prepare,
            seed=self.config.seed,
            accumulate=self.config.accumulate,
            gather=self.gathered,
        )

    def calibrated(self, state: TrainState, batches: Iterable[HostShapes]) -> TrainState:
        """The state after the method has calibrated itself on some batches, see `Method`."""

        def update(state: TrainState, batch: Batch, number: jax.Array) -> TrainState:
            rng = jax.random.fold_in(jax.random.key(self.config.seed), number)
            batch = self.prepare(batch, step.stream_keys(rng, ("prepare",))["prepare"])
            rngs = step.stream_keys(rng, self.method.streams)
            changed = self.method.calibrate(state.variables, batch, rngs)
            return dataclasses.replace(state, mutable={**state.mutable, **changed})

        where = jax.tree.map(lambda leaf: leaf.sharding, state)
        rows = sharding.batch_sharding(self.mesh)
        compiled = jax.jit(update, in_shardings=(where, rows, None), out_shardings=where)
        for number, batch in enumerate(batches):
            on_devices = {
                name: jax.make_array_from_process_local_data(rows, array)
                for name, array in batch.items()
            }
            state = compiled(state, on_devices, number)
        return state

    def train_step(self) -> step.TrainStep:
        """The train step, not yet compiled."""
        return step.make_train_step(
            self.method,
            self.optimizer,
            self.schedules,
            self.prepare,
            seed=self.config.seed,
            accumulate=self.config.accumulate,
            gather=self.gathered,
        )

    def compiled_step(self, shapes: HostShapes) -> jax.stages.Compiled:
        """The step, compiled ahead of time for one batch shape: it can never recompile.

        Args:
            shapes: arrays (or shapes) of one host batch; its rows are those of this process.
        """
        return self.lowered_step(shapes).compile()

    def lowered_step(self, shapes: HostShapes) -> jax.stages.Lowered:
        """`compiled_step` before the compiler: the same program for any kind of device."""
        state = self.abstract_state(shapes)
        where = jax.tree.map(lambda leaf: leaf.sharding, state)
        rows = sharding.batch_sharding(self.mesh)
        step_function = jax.jit(
            self.train_step(),
            in_shardings=(where, rows),
            out_shardings=(where, None),
            donate_argnums=0,
        )
        return step_function.lower(state, self.global_batch(shapes))

    def global_batch(self, shapes: HostShapes) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the batch over all processes."""
        rows = self.config.batch_size
        return {
            name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype)
            for name, array in shapes.items()
        }

    def flops_per_step(self, shapes: HostShapes) -> float:
        """Model FLOPs of one step, forward and backward, without rematerialization."""
        config = self.config.copy_and_resolve_references()
        if "remat" in config.model:
            config.model.remat = "none"
        plain = dataclasses.replace(self, method=type(self.method).build(config))
        return count_flops(
            plain.train_step(), plain.abstract_state(shapes), plain.global_batch(shapes)
        )


def training_batches(
    config: ml_collections.ConfigDict,
    source: Source,
    start_step: int,
    num_steps: int | None = None,
    *,
    timed: bool = False,
) -> Batches:
    """The batches that this process trains on, see `mim_jax.data.train_batches`."""
    return train_batches(
        source,
        training_transform(config, source),
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        num_steps=num_steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        timed=timed,
        order=training_order(config),
    )


def training_order(config: ml_collections.ConfigDict) -> OrderOf:
    """Which examples make a batch."""
    if config.data.batches == "domains":
        return domain_order(config.data.domains_per_batch, config.accumulate)
    return ShuffledOrder


def training_transform(config: ml_collections.ConfigDict, source: Source) -> TrainTransform:
    """What makes rows of a training batch from the examples of a source."""
    if isinstance(source, TableSource):
        return table_views(config.data, source)
    if getattr(source, "kind", "image") == "volume":
        return volume_crops(config.data)
    return training_crop(config)


def training_rows(config: ml_collections.ConfigDict, source: Source) -> int:
    """Rows that an epoch has: the examples of a source, or all their views."""
    return len(source) * (views_of(training_transform(config, source)) or 1)


def training_crop(config: ml_collections.ConfigDict) -> TrainTransform:
    """The training crop of a config, and what other fields of `data` add to it."""
    data = config.data
    fields: dict[str, Any] = dict(
        size=tuple(data.image_size),
        area=tuple(data.crop_area),
        aspect=tuple(data.crop_aspect),
        backend=data.backend,
    )
    steps: list[TrainTransform] = []
    if data.crop == "keep_ratio":
        steps.append(KeepRatioCrop(**fields))
    elif data.target_size:
        crop = RandomResizedCrop(**fields)
        steps.append(CropWithTarget(crop, tuple(data.target_size), data.target_interpolation))
    else:
        steps.append(RandomResizedCrop(**fields))
    if any(data.color_jitter):
        steps.insert(0, ColorJitter(*data.color_jitter))
    if data.augment:
        steps.append(RandAugment.from_string(data.augment, data.mean))
    return steps[0] if len(steps) == 1 else Composed(tuple(steps))
