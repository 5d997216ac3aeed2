"""The contract that every pre-training method fulfils, and the registry of methods by name."""

import abc
import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import ml_collections
import numpy as np

from mim_jax.layout import Layout
from mim_jax.models.vit import ViT

Variables = Mapping[str, Any]
"""Linen variables: `params` and any mutable collections (`batch_stats`, ...)."""

Batch = Mapping[str, jax.Array]
"""Arrays by name, each with the batch as its leading axis."""


@flax.struct.dataclass
class Aux:
    """What a loss reports beside its value.

    Attributes:
        metrics: named float32 scalars, every loss term by the paper's name.
        mutable: updated mutable collections, empty if the method has none.
    """

    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    mutable: dict[str, Any] = dataclasses.field(default_factory=dict)


@flax.struct.dataclass
class Features:
    """What evaluation protocols read from an encoder: no masking, deterministic.

    Attributes:
        pooled: `[batch, width]`, the representation of the image that the paper evaluates.
        tokens: `[batch, tokens, width]`, patch tokens in row-major order, without class token.
        grid: patches along each axis of the image.
    """

    pooled: jax.Array
    tokens: jax.Array
    grid: tuple[int, ...] = flax.struct.field(pytree_node=False)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Picture:
    """Images to show side by side, one row for each sample.

    Attributes:
        columns: by title, images `[batch, height, width, channels]` in normalized image space;
            shown from left to right in the order of the dictionary.
        caption: what a reader must know to read the picture.
    """

    columns: dict[str, jax.Array]
    caption: str = ""

    def tree_flatten(self) -> tuple[tuple[jax.Array, ...], tuple[tuple[str, ...], str]]:
        """The images, and titles and caption; JAX would sort a dictionary's keys under `jit`."""
        return tuple(self.columns.values()), (tuple(self.columns), self.caption)

    @classmethod
    def tree_unflatten(
        cls, texts: tuple[tuple[str, ...], str], images: tuple[jax.Array, ...]
    ) -> "Picture":
        """Inverse of `tree_flatten`."""
        titles, caption = texts
        return cls(dict(zip(titles, images, strict=True)), caption)


@dataclasses.dataclass(frozen=True)
class Input:
    """A batch entry that a method needs: its shape and its kind of number.

    Attributes:
        shape: expected shape without the batch axis; None where any size will do.
        dtype: "float" or "int"; uint8 images count as "float", since the train step makes them so,
            and truth values as "int".
    """

    shape: tuple[int | None, ...]
    dtype: str = "float"


@dataclasses.dataclass(frozen=True)
class Ema:
    """A part of the parameters that follows another as an exponential moving average.

    After every update `target <- m * target + (1 - m) * source`; at the start target is a copy.

    Attributes:
        source: path prefix of the part that is trained.
        target: path prefix of the part that follows; it gets no gradient.
        momentum: m in [0, 1], or a function of the step.
    """

    source: str
    target: str
    momentum: float | Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters with an optimizer of their own, chosen by path; the first match wins.

    Attributes:
        name: the field of `config.optimizer.groups` that may change this group's settings.
        pattern: regular expression searched in the parameter's path.
        settings: fields of `config.optimizer` that differ for this group.
    """

    name: str
    pattern: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A part of the parameters that starts from weights of its own, such as a frozen teacher.

    Attributes:
        target: path prefix of the part.
        module: the Linen module whose parameters they are; its class decides how a file is read.
        path: where the weights are: a file, a model folder, or the folder of a run.
        field: config field that names the path, for messages.
        fresh: path patterns inside the part that keep their initial values.
    """

    target: str
    module: nn.Module
    path: str
    field: str = "model.teacher.path"
    fresh: tuple[str, ...] = ()


class Method(abc.ABC):
    """A pre-training method: a frozen dataclass around one or more Linen modules.

    Class attributes are declarations that the train loop reads; `init`, `loss` and `features` are
    pure functions.

    Attributes:
        inputs: batch entries that the method needs.
        streams: names of the random streams that `loss` gets.
        frozen: path patterns of parameters with neither gradient nor optimizer state.
        pretrained: parts that start from weights of their own.
        ema: parts that follow other parts.
        calibration_batches: how many batches `calibrate` gets to see.
        groups: optimizer groups; parameters that match none are in the group "default".
        no_decay: path patterns of parameters without weight decay, beside all biases, norm scales
            and other 1-D parameters.
    """

    streams: ClassVar[tuple[str, ...]] = ()
    ema: ClassVar[tuple[Ema, ...]] = ()
    groups: ClassVar[tuple[Group, ...]] = ()
    no_decay: ClassVar[tuple[str, ...]] = ()

    @property
    def frozen(self) -> tuple[str, ...]:
        """See the attributes."""
        return ()

    @property
    def pretrained(self) -> tuple[Pretrained, ...]:
        """See the attributes."""
        return ()

    @property
    def calibration_batches(self) -> int:
        """See the attributes."""
        return 0

    @classmethod
    @abc.abstractmethod
    def build(cls, config: ml_collections.ConfigDict) -> "Method":
        """The method that a config describes; the only place where the config is read."""

    @property
    @abc.abstractmethod
    def inputs(self) -> Mapping[str, Input]:
        """Batch entries that the method needs, by name."""

    @abc.abstractmethod
    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial variables; only shapes are read from the batch."""

    @abc.abstractmethod
    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """The training objective: a float32 scalar, and what else to report."""

    @abc.abstractmethod
    def features(self, variables: Variables, batch: Batch) -> Features:
        """The representation of every image, without masking or randomness."""

    def calibrate(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> Mapping[str, Any]:
        """Statistics that the loss needs before the first step, updated by one batch.

        Called for `calibration_batches` training batches in a row when a run begins, before any
        parameter has changed.

        Returns:
            The mutable collections that changed. They are kept in the checkpoints.
        """
        return {}

    def pictures(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> dict[str, Picture]:
        """Pictures by name that show what the model does; empty if there are none."""
        return {}

    def rate_scale(self, path: str, shape: tuple[int, ...]) -> float | np.ndarray:
        """Factor on the learning rate of one parameter, such as a layer-wise decay.

        Args:
            path: of the parameter.
            shape: of the parameter; one that is stacked over blocks may get a factor for each,
                `[depth, 1, ...]`.
        """
        return 1.0

    @property
    def encoder(self) -> ViT | None:
        """The ViT whose parameters lie below "encoder/", or None if there is no such thing."""
        return None

    def layout(self) -> Layout | None:
        """The table of the paper's official checkpoint, or None if there is none."""
        return None

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> "Method":
        """This method with the sizes of an official state dict.

        Args:
            state: arrays by official key.
            known: sizes that shapes do not tell, as far as another source does: `heads`,
                `decoder_heads`, `image_size`. Without it they stay as they are here.

        Raises:
            ValueError: if the state dict is of another kind.
        """
        return self

    def adopt(
        self, path: str, given: Mapping[str, np.ndarray], donor: "Method"
    ) -> np.ndarray | None:
        """One of this method's parameters, from those of another model of perhaps other sizes.

        Args:
            path: of the parameter.
            given: the donor's parameters by path.
            donor: the method that they belong to.

        Returns:
            The array, or None if the donor has nothing for it.
        """
        return given.get(path)

    def check(self, batch: Mapping[str, Any]) -> None:
        """Compares a batch with `inputs`, before anything is compiled.

        Raises:
            ValueError: naming the entry, what it is and what it should be.
        """
        for name, wanted in self.inputs.items():
            if name not in batch:
                mend = _mend_of_target(wanted) if name == "target_image" else ""
                raise ValueError(
                    f"method {type(self).__name__} needs the batch entry {name!r}, but the data "
                    f"gives only {sorted(batch)}.{mend}"
                )
            given = batch[name]
            kind = "f" if str(given.dtype) == "bfloat16" else np.dtype(given.dtype).kind
            if kind not in ("iub" if wanted.dtype == "int" else "fu"):
                raise ValueError(
                    f"batch entry {name!r} has type {given.dtype}; expected {wanted.dtype}."
                )
            shape = tuple(given.shape[1:])
            fits = len(shape) == len(wanted.shape) and all(
                want in (None, have) for have, want in zip(shape, wanted.shape)
            )
            if not fits:
                text = ", ".join("any" if size is None else str(size) for size in wanted.shape)
                mend = " Set data.image_size and data.channels to what the data has."
                raise ValueError(
                    f"batch entry {name!r} has shape [batch, {', '.join(map(str, shape))}]; the "
                    f"method expects [batch, {text}]."
                    + (_mend_of_target(wanted) if name == "target_image" else mend)
                )


def _mend_of_target(wanted: Input) -> str:
    return f" Set data.target_size to {wanted.shape[:2]}."


def variable_shapes(method: Method) -> Any:
    """The variables of a method as shapes, without computing them."""
    batch: Any = {
        name: jax.ShapeDtypeStruct((1, *(size or 1 for size in wanted.shape)), np.float32)
        for name, wanted in method.inputs.items()
    }
    return jax.eval_shape(lambda: method.init(jax.random.key(0), batch))


def parameter_shapes(method: Method) -> Any:
    """The parameters of a method as shapes, without computing them."""
    return variable_shapes(method)["params"]


_REGISTRY: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator that makes a method known by name.

    Raises:
        ValueError: from the decorator, if another class has the name already. The same class may
            come again, as it does when a notebook reloads its module.
    """

    def add(cls: type[Method]) -> type[Method]:
        other = _REGISTRY.get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"two methods are called {name!r}: {other.__module__}.{other.__qualname__} and "
                f"{cls.__module__}.{cls.__qualname__}; rename one."
            )
        _REGISTRY[name] = cls
        return cls

    return add


def method_names() -> list[str]:
    """Names of all methods in `mim_jax.methods`, sorted."""
    package = importlib.import_module("mim_jax.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"mim_jax.methods.{module.name}")
    return sorted(_REGISTRY)


def method_class(name: str) -> type[Method]:
    """The class registered under a name.

    Raises:
        ValueError: if there is none; the message lists the known names.
    """
    names = [name] if name in _REGISTRY else method_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown method {name!r}; known are {', '.join(names)}.{hint}")
    return _REGISTRY[name]
