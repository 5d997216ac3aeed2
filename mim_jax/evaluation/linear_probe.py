"""Linear classifiers on a frozen encoder: a fast exact one, and MAE's LARS recipe (appendix A.1).

`linear_accuracy` fits logistic regression to features that were extracted once; it suits small
data. `lars_probe_accuracy` trains `LinearProbe`, which augments the images anew in every epoch, in
the one train step; it is what papers report on ImageNet.
"""

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from mim_jax import config as configs
from mim_jax.data.on_device import normalize, random_flip
from mim_jax.evaluation.features import (
    check_pool,
    extract_features,
    mesh_of,
    place,
    pooled,
    row_shards,
)
from mim_jax.evaluation.knn import check_features_and_labels
from mim_jax.evaluation.labelled_data import centre_crops, labelled_source, random_crops
from mim_jax.losses import cross_entropy
from mim_jax.method import Aux, Batch, Features, Input, Method, Variables, method_class
from mim_jax.training.optimizer import Schedule, build_optimizer, warmup_cosine
from mim_jax.training.state import TrainState, state_from_variables
from mim_jax.training.step import make_train_step

L2_STRENGTH = 1e-2
"""Weight of |w|^2 / 2 against the mean cross-entropy, so it means the same for any data size."""

MAX_ITERATIONS = 500
"""L-BFGS steps; a probe that stops here is as good as converged for an accuracy."""

WARMUP_SHARE = 1 / 9
"""The paper warms up for 10 of 90 epochs."""

_log = logging.getLogger(__name__)


def linear_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
) -> float:
    """Share of test examples that logistic regression classifies correctly, in [0, 1].

    Multinomial logistic regression by L-BFGS from zero weights, so nothing is random. Features are
    standardized by the training split's statistics, which makes the fixed penalty `L2_STRENGTH`
    mean the same for every encoder. Work and memory grow with the data in one process: for
    millions of examples take `lars_probe_accuracy`.

    Args:
        train_features: `[train examples, width]`.
        train_labels: integers `[train examples]`.
        test_features: `[test examples, width]`.
        test_labels: integers `[test examples]`.

    Raises:
        ValueError: arrays that do not fit together, or fewer than two classes to tell apart.
    """
    check_features_and_labels(train_features, train_labels, test_features, test_labels)
    if len(np.unique(train_labels)) < 2:
        raise ValueError("all training labels are equal; a linear probe needs two classes.")
    train = np.asarray(train_features, np.float64)
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation[deviation == 0] = 1  # a constant feature stays at zero
    classifier = LogisticRegression(
        C=1 / (L2_STRENGTH * len(train)), max_iter=MAX_ITERATIONS, solver="lbfgs"
    )
    # One thread adds up in one order, so the result repeats; and threads of linear algebra that
    # wait for each other make this many times slower on a busy machine.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit((train - mean) / deviation, train_labels)
    predicted = classifier.predict((np.asarray(test_features, np.float64) - mean) / deviation)
    return float(np.mean(predicted == test_labels))


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
class LinearProbe(Method):
    """A linear classifier on the features of another method, whose parameters stay as they are.

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
    def build(cls, config: ml_collections.ConfigDict) -> "LinearProbe":
        """Probes the method of a config; the labelled source tells the number of classes."""
        return cls.of(method_class(config.method).build(config), config)

    @classmethod
    def of(cls, method: Method, config: ml_collections.ConfigDict) -> "LinearProbe":
        """Probes a method on the labelled data of a config."""
        _, num_classes = labelled_source(config, config.evaluate.train_split)
        return cls(method, num_classes, config.evaluate.pool, config.evaluate.batch_size)

    @property
    def head(self) -> ProbeHead:
        """The classifier."""
        return ProbeHead(self.num_classes)

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
        features = jax.eval_shape(self._features_at_once, backbone, images)
        head = self.head.init(rng, jnp.zeros(features.shape), train=True)
        return _join({"backbone": backbone, "head": head})

    def logits(self, variables: Variables, features: jax.Array) -> jax.Array:
        """Logits `[batch, classes]` of features `[batch, width]` by the running statistics."""
        logits = self.head.apply(_part(variables, "head"), features, train=False)
        assert isinstance(logits, jax.Array)
        return logits

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Cross-entropy of the classifier, with its top-1 accuracy on the batch."""
        features = self._features_in_parts(_part(variables, "backbone"), batch["image"])
        logits, updated = self.head.apply(
            _part(variables, "head"),
            jax.lax.stop_gradient(features),
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

    def _features_at_once(self, backbone: Variables, images: jax.Array) -> jax.Array:
        return pooled(self.method.features(backbone, {"image": images}), self.pool)

    def _features_in_parts(self, backbone: Variables, images: jax.Array) -> jax.Array:
        """Features `[batch, width]`, computed for one part of the batch after the other."""
        size = len(images)
        parts = -(-size // self.examples_at_once) if self.examples_at_once else 1
        if parts == 1:
            return self._features_at_once(backbone, images)
        filled = jnp.pad(images, [(0, -size % parts)] + [(0, 0)] * (images.ndim - 1))
        # A part has every `parts`-th example, so that each device keeps its own rows.
        split = filled.reshape(-1, parts, *images.shape[1:]).swapaxes(0, 1)
        features = jax.lax.map(lambda part: self._features_at_once(backbone, part), split)
        return features.swapaxes(0, 1).reshape(len(filled), -1)[:size]


def lars_probe_accuracy(
    method: Method,
    variables: Variables,
    config: ml_collections.ConfigDict,
    *,
    batch_size: int = 16384,
    epochs: float = 90.0,
    base_lr: float = 0.1,
    seed: int | None = None,
) -> float:
    """Top-1 accuracy in [0, 1] of MAE's linear probe, trained on the config's labelled data.

    LARS with momentum 0.9 and no weight decay; rate `base_lr * batch / 256`, warmed up over a
    ninth of the epochs (10 of 90) and brought to 0 by a cosine; random crops of 8 % to 100 % of
    the image, and flips unless `config.data.flip` is off. The defaults are the paper's. They need
    the thousands of steps that ImageNet gives: LARS moves the classifier by 0.1 % of its length at
    rate 1, so on a few thousand images it stops far from the optimum, where `linear_accuracy`
    finds it.

    Args:
        method: gives the features.
        variables: of the method, on any devices; they are not changed.
        config: names data, crop and pool in `data` and `evaluate`.
        batch_size: a smaller data set is one batch; rounded down to what the devices divide.
        epochs: passes over the training split.
        base_lr: learning rate at batch size 256.
        seed: of the classifier, the order and the crops; None takes `config.seed`.

    Raises:
        ValueError: for data without labels, fewer examples than devices, or features that are
            not finite.
    """
    seed = config.seed if seed is None else seed
    probe = LinearProbe.of(method, config)
    trained = train_probe(
        probe, variables, config, batch_size=batch_size, epochs=epochs, base_lr=base_lr, seed=seed
    )
    features, labels = extract_features(
        method,
        variables,
        centre_crops(config, config.evaluate.test_split),
        mean=config.data.mean,
        std=config.data.std,
        pool=config.evaluate.pool,
    )
    logits = probe.logits(jax.device_get(_only_head(trained)), jnp.asarray(features))
    return float(np.mean(np.argmax(logits, axis=-1) == labels))


def train_probe(
    probe: LinearProbe,
    variables: Variables,
    config: ml_collections.ConfigDict,
    *,
    batch_size: int,
    epochs: float,
    base_lr: float,
    seed: int,
) -> Variables:
    """The variables of a probe after the recipe of `lars_probe_accuracy`, same arguments."""
    split = config.evaluate.train_split
    mesh = mesh_of(variables)
    examples = len(labelled_source(config, split)[0])
    batch_size = probe_batch_size(batch_size, examples, mesh)
    steps_per_epoch = examples // batch_size
    num_steps = max(1, round(epochs * steps_per_epoch))
    schedule = warmup_cosine(
        base_lr * batch_size / 256,
        min_lr=0.0,
        warmup_epochs=WARMUP_SHARE * epochs,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
    )
    optimizer = probe_optimizer(schedule)
    height, width = config.data.image_size
    like = {"image": jnp.zeros((1, height, width, config.data.channels))}
    start = probe.with_head(jax.random.key(seed), variables, like)
    state = _on_mesh(state_from_variables(probe, optimizer, start), mesh)
    step = make_train_step(probe, optimizer, {"default": schedule}, _prepare(config), seed=seed)
    batches = random_crops(config, split, batch_size=batch_size, seed=seed, num_steps=num_steps)
    return _trained(state, _compiled(step, state, mesh), batches, mesh, num_steps).variables


def probe_batch_size(wanted: int, examples: int, mesh: Mesh | None) -> int:
    """The batch size, capped to the data set and rounded down to a multiple of the devices.

    Raises:
        ValueError: if that leaves fewer than the two examples that a batch norm needs.
    """
    size = min(wanted, examples)
    size -= size % row_shards(mesh)
    if size < 2:
        raise ValueError(
            f"a linear probe needs a batch of at least 2 and one example for each device; the "
            f"batch size is {wanted}, the data have {examples} examples, and there are "
            f"{row_shards(mesh)} devices to feed."
        )
    return size


def probe_optimizer(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """LARS with momentum 0.9, trust coefficient 0.001 and no weight decay (MAE's `util/lars.py`).

    Args:
        schedule: learning rate by step.
    """
    settings = configs.defaults().optimizer
    settings.update(name="lars", momentum=0.9, trust_coefficient=1e-3, weight_decay=0.0)
    return build_optimizer(settings, (), {"default": schedule})


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
) -> TrainState:
    """The state after all batches; says ten times how it goes."""
    for i, batch in enumerate(batches, start=1):
        inputs = {name: batch[name] for name in ("image", "label")}
        state, metrics = step(state, place(inputs, mesh))
        if i % max(1, num_steps // 10) == 0:
            loss, top1 = float(metrics["loss"]), float(metrics["top1"])
            _log.info("linear probe: step %d of %d, loss %.4f, top1 %.4f", i, num_steps, loss, top1)
    if skipped := int(state.skipped):
        raise ValueError(
            f"the linear probe's loss was not finite in {skipped} of {num_steps} steps; look for "
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


def _only_head(variables: Variables) -> dict[str, Any]:
    """The classifier's variables, still under their name."""
    return _join({"head": _part(variables, "head")})
