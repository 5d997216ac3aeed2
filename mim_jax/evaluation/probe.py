"""Trains a classifier on a frozen encoder, with augmentation, in the one train step.

What probes have in common; `linear_probe` and `attentive_probe` say which head and which recipe.
"""

import abc
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mim_jax.data.on_device import normalize, random_flip
from mim_jax.evaluation.classification import predict
from mim_jax.evaluation.features import check_pool, mesh_of, place, pooled, row_shards
from mim_jax.evaluation.labelled_data import labelled_source, random_crops
from mim_jax.losses import cross_entropy
from mim_jax.method import Aux, Batch, Features, Input, Method, Variables, method_class
from mim_jax.training.optimizer import Schedule, warmup_cosine
from mim_jax.training.state import TrainState, state_from_variables
from mim_jax.training.step import make_train_step

WARMUP_SHARE = 1 / 9
"""The papers warm up for 10 of 90 epochs."""

_log = logging.getLogger(__name__)


class ProbeHead(nn.Module):
    """Batch norm without affine parameters, then a linear layer (MAE's `main_linprobe.py`).

    PyTorch's batch norm: the batch is normalized by its biased variance, while the running
    variance follows the unbiased one. Flax's own uses the biased one for both. In a jitted step
    the statistics are those of the whole batch over all devices; the official code takes them per
    GPU.

    Attributes:
        num_classes: number of logits.
        momentum: share of the old running statistics that is kept (PyTorch calls 1 - this
            momentum).
        epsilon: added to the variance.
    """

    num_classes: int
    momentum: float = 0.9
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool) -> jax.Array:
        """Logits float32 `[batch, classes]` of features `[batch, width]`.

        With `train`, normalizes by the batch and updates the collection `batch_stats`; without,
        by the running statistics.

        Raises:
            ValueError: training on fewer than two examples, which have no variance.
        """
        features = features.astype(jnp.float32)
        size, width = features.shape
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (width,))
        mean, var = running_mean.value, running_var.value
        if train and not self.is_initializing():
            if size < 2:
                raise ValueError(f"the probe's batch norm needs 2 examples or more, got {size}.")
            mean, var = jnp.mean(features, axis=0), jnp.var(features, axis=0)
            keep = self.momentum
            unbiased = var * (size / (size - 1))
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * unbiased
        normalized = (features - mean) * jax.lax.rsqrt(var + self.epsilon)
        return nn.Dense(
            self.num_classes,
            # The official truncation is at +-2, not at 2 deviations, so it cuts nothing off.
            kernel_init=nn.initializers.normal(0.01),
            precision=jax.lax.Precision.HIGHEST,
            name="linear",
        )(normalized)


@dataclasses.dataclass(frozen=True)
class Probe(Method):
    """A classifier on the features of another method, whose parameters stay as they are.

    Every collection of the wrapped method lies under "backbone", the classifier's under "head".

    Attributes:
        method: gives the features.
        num_classes: number of classes.
        pool: "method" or "mean", see `evaluation.features.POOLS`.
        examples_at_once: the backbone sees a batch in parts of at most so many examples, so that
            the recipe's batch of 16,384 fits in memory; 0 takes the whole batch at once.
    """

    method: Method
    num_classes: int
    pool: str = "method"
    examples_at_once: int = 0

    frozen: ClassVar[tuple[str, ...]] = ("backbone/",)

    def __post_init__(self) -> None:
        check_pool(self.pool)

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> Self:
        """Probes the method of a config; the labelled source tells the number of classes."""
        return cls.of(method_class(config.method).build(config), config)

    @classmethod
    def of(cls, method: Method, config: ml_collections.ConfigDict) -> Self:
        """Probes a method on the labelled data of a config."""
        _, num_classes = labelled_source(config, config.evaluate.train_split)
        return cls(method, num_classes, config.evaluate.pool, config.evaluate.batch_size)

    @property
    @abc.abstractmethod
    def head(self) -> nn.Module:
        """The classifier: a module of (what `represent` gives, train)."""

    def represent(self, features: Features) -> jax.Array:
        """What the classifier sees of the images, float32 `[batch, ...]`; here one vector each."""
        return pooled(features, self.pool)

    @property
    def inputs(self) -> Mapping[str, Input]:
        """The method's images, and a label for each."""
        return {"image": self.method.inputs["image"], "label": Input((), "int")}

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """A fresh backbone with a fresh classifier."""
        backbone_rng, head_rng = jax.random.split(rng)
        return self.with_head(head_rng, self.method.init(backbone_rng, batch), batch)

    def with_head(self, rng: jax.Array, backbone: Variables, batch: Batch) -> Variables:
        """A given backbone, as the wrapped method knows it, with a fresh classifier."""
        images = jax.ShapeDtypeStruct((2, *batch["image"].shape[1:]), jnp.float32)
        seen = jax.eval_shape(self._seen_at_once, backbone, images)
        head = self.head.init(rng, jnp.zeros(seen.shape), train=True)
        return _join({"backbone": backbone, "head": head})

    def logits(self, variables: Variables, images: jax.Array) -> jax.Array:
        """Logits `[batch, classes]` of normalized images, by the running statistics."""
        seen = self._seen_at_once(_part(variables, "backbone"), images)
        logits = self.head.apply(_part(variables, "head"), seen, train=False)
        assert isinstance(logits, jax.Array)
        return logits

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Cross-entropy of the classifier, with its top-1 accuracy on the batch."""
        seen = self._seen_in_parts(_part(variables, "backbone"), batch["image"])
        logits, updated = self.head.apply(
            _part(variables, "head"),
            jax.lax.stop_gradient(seen),
            train=True,
            mutable=["batch_stats"],
        )
        statistics = {**variables["batch_stats"], "head": updated["batch_stats"]}
        top1 = jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])
        return cross_entropy(logits, batch["label"]), Aux(
            {"top1": top1}, {"batch_stats": statistics}
        )

    def features(self, variables: Variables, batch: Batch) -> Features:
        """The features of the wrapped method."""
        return self.method.features(_part(variables, "backbone"), batch)

    def _seen_at_once(self, backbone: Variables, images: jax.Array) -> jax.Array:
        return self.represent(self.method.features(backbone, {"image": images}))

    def _seen_in_parts(self, backbone: Variables, images: jax.Array) -> jax.Array:
        """What the classifier sees, computed for one part of the batch after the other."""
        size = len(images)
        parts = -(-size // self.examples_at_once) if self.examples_at_once else 1
        if parts == 1:
            return self._seen_at_once(backbone, images)
        filled = jnp.pad(images, [(0, -size % parts)] + [(0, 0)] * (images.ndim - 1))
        # A part has every `parts`-th example, so that each device keeps its own rows.
        split = filled.reshape(-1, parts, *images.shape[1:]).swapaxes(0, 1)
        seen = jax.lax.map(lambda part: self._seen_at_once(backbone, part), split)
        return seen.swapaxes(0, 1).reshape(len(filled), *seen.shape[2:])[:size]


def probe_accuracy(probe: Probe, trained: Variables, config: ml_collections.ConfigDict) -> float:
    """Top-1 accuracy in [0, 1] of a trained probe on the test split that the config names."""
    logits, labels = predict(probe, trained, config, config.evaluate.test_split)
    return float(np.mean(np.argmax(logits, axis=-1) == labels))


def train_probe(
    probe: Probe,
    variables: Variables,
    config: ml_collections.ConfigDict,
    optimizer_of: Callable[[Schedule], optax.GradientTransformationExtraArgs],
    *,
    batch_size: int,
    epochs: float,
    peak_lr: Callable[[int], float],
    seed: int,
) -> Variables:
    """The variables of a probe after training on the config's labelled data.

    The rate is warmed up over a ninth of the epochs and brought to 0 by a cosine. Crops cover 8 %
    to 100 % of the image; flips follow `config.data.flip`.

    Args:
        probe: classifier and frozen method.
        variables: of the method, on any devices; they are not changed.
        config: names data and crop in `data` and `evaluate`.
        optimizer_of: the optimizer for a learning rate by step.
        batch_size: a smaller data set is one batch; rounded down to what the devices divide.
        epochs: passes over the training split.
        peak_lr: largest learning rate by the size of the batch.
        seed: of the classifier, the order and the crops.

    Raises:
        ValueError: for data without labels, fewer examples than devices, or features that are
            not finite.
    """
    split = config.evaluate.train_split
    mesh = mesh_of(variables)
    examples = len(labelled_source(config, split)[0])
    batch_size = probe_batch_size(batch_size, examples, mesh)
    steps_per_epoch = examples // batch_size
    num_steps = max(1, round(epochs * steps_per_epoch))
    schedule = warmup_cosine(
        peak_lr(batch_size),
        min_lr=0.0,
        warmup_epochs=WARMUP_SHARE * epochs,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
    )
    optimizer = optimizer_of(schedule)
    height, width = config.data.image_size
    like = {"image": jnp.zeros((1, height, width, config.data.channels))}
    start = probe.with_head(jax.random.key(seed), variables, like)
    state = _on_mesh(state_from_variables(probe, optimizer, start), mesh)
    step = make_train_step(probe, optimizer, {"default": schedule}, _prepare(config), seed=seed)
    batches = random_crops(config, split, batch_size=batch_size, seed=seed, num_steps=num_steps)
    name = type(probe).__name__
    return _trained(state, _compiled(step, state, mesh), batches, mesh, num_steps, name).variables


def probe_batch_size(wanted: int, examples: int, mesh: Mesh | None) -> int:
    """The batch size, capped to the data set and rounded down to a multiple of the devices.

    Raises:
        ValueError: if that leaves fewer than the two examples that a batch norm needs.
    """
    size = min(wanted, examples)
    size -= size % row_shards(mesh)
    if size < 2:
        raise ValueError(
            f"a probe needs a batch of at least 2 and one example for each device; the "
            f"batch size is {wanted}, the data have {examples} examples, and there are "
            f"{row_shards(mesh)} devices to feed."
        )
    return size


def _prepare(config: ml_collections.ConfigDict) -> Callable[[Batch, jax.Array], Batch]:
    """Normalization and flip on the device."""
    mean, std, flips = tuple(config.data.mean), tuple(config.data.std), config.data.flip

    def prepare(batch: Batch, rng: jax.Array) -> Batch:
        images = normalize(batch["image"], mean, std)
        return {**batch, "image": random_flip(rng, images) if flips else images}

    return prepare


def _trained(
    state: TrainState,
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]],
    batches: Iterator[dict[str, np.ndarray]],
    mesh: Mesh | None,
    num_steps: int,
    name: str,
) -> TrainState:
    """The state after all batches; says ten times how it goes."""
    for i, batch in enumerate(batches, start=1):
        inputs = {name: batch[name] for name in ("image", "label")}
        state, metrics = step(state, place(inputs, mesh))
        if i % max(1, num_steps // 10) == 0:
            loss, top1 = float(metrics["loss"]), float(metrics["top1"])
            _log.info("%s: step %d of %d, loss %.4f, top1 %.4f", name, i, num_steps, loss, top1)
    if skipped := int(state.skipped):
        raise ValueError(
            f"the {name}'s loss was not finite in {skipped} of {num_steps} steps; look for "
            "non-finite parameters or images in the encoder's run."
        )
    return state


def _compiled(step: Callable, state: TrainState, mesh: Mesh | None) -> Callable:
    """The step, compiled so that every array of the state stays where it is."""
    if mesh is None:
        return jax.jit(step)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))


def _on_mesh(state: TrainState, mesh: Mesh | None) -> TrainState:
    """A state whose arrays are all on the mesh: those that are not yet become replicated."""
    if mesh is None:
        return state
    replicated = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: jax.Array) -> jax.Array:
        is_placed = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)
        return leaf if is_placed else jax.device_put(leaf, replicated)

    return jax.tree.map(placed, state)


def _join(parts: Mapping[str, Variables]) -> dict[str, Any]:
    """Variables in which each collection holds the parts' collections by the parts' names."""
    collections = dict.fromkeys(name for variables in parts.values() for name in variables)
    return {
        collection: {
            part: variables[collection]
            for part, variables in parts.items()
            if collection in variables
        }
        for collection in collections
    }


def _part(variables: Variables, part: str) -> dict[str, Any]:
    """The inverse of `_join` for one part."""
    return {name: parts[part] for name, parts in variables.items() if part in parts}
