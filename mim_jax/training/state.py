"""The train state: everything that a checkpoint holds and a step changes."""

import re
from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mim_jax.method import Batch, Ema, Method
from mim_jax.training import tree


@flax.struct.dataclass
class TrainState:
    """State of a run.

    Attributes:
        step: int32, optimizer steps taken, skipped ones included.
        params: all parameters, frozen ones included, float32.
        mutable: mutable collections, such as `batch_stats`.
        opt_state: optimizer state of the trainable parameters.
        skipped: int32, steps whose loss or gradient was not finite.
        skipped_in_row: int32, how many of the latest steps were skipped in a row.
    """

    step: jax.Array
    params: Any
    mutable: Any
    opt_state: Any
    skipped: jax.Array
    skipped_in_row: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """Linen variables for the method's functions."""
        return {"params": self.params, **self.mutable}


def fixed_patterns(method: Method) -> tuple[str, ...]:
    """Patterns of parameters without gradient: frozen ones and those that follow by EMA."""
    return (*method.frozen, *(f"{re.escape(ema.target)}(/|$)" for ema in method.ema))


def split_trainable(method: Method, params: Any) -> tuple[dict, dict]:
    """Trainable parameters, and all others.

    Raises:
        ValueError: if a declared pattern matches no parameter, or nothing is left to train.
    """
    for pattern in fixed_patterns(method):
        if not any(re.match(pattern, path) for path in tree.flatten(params)):
            raise ValueError(
                f"{type(method).__name__} declares {pattern!r} as frozen or EMA, but no "
                "parameter path starts with it."
            )
    trainable, fixed = tree.split(params, fixed_patterns(method))
    if not trainable:
        raise ValueError(f"{type(method).__name__} leaves no parameter to train.")
    return trainable, fixed


def start_ema(emas: Iterable[Ema], params: Any) -> Any:
    """Parameters in which every EMA target is a copy of its source."""
    flat = tree.flatten(params)
    for ema in emas:
        source = tree.subtree(params, ema.source)
        target = tree.subtree(params, ema.target)
        if set(source) != set(target):
            raise ValueError(
                f"EMA target {ema.target!r} does not have the parameters of {ema.source!r}; "
                f"they differ in {sorted(set(source) ^ set(target))}."
            )
        flat |= {f"{ema.target}/{path}": leaf for path, leaf in source.items()}
    return tree.unflatten(flat)


def state_from_variables(
    method: Method, optimizer: optax.GradientTransformation, variables: Any
) -> TrainState:
    """A state at step 0 around given variables."""
    params = start_ema(method.ema, variables["params"])
    trainable, _ = split_trainable(method, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        mutable={name: value for name, value in variables.items() if name != "params"},
        opt_state=optimizer.init(trainable),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )


def init_state(
    method: Method, optimizer: optax.GradientTransformation, rng: jax.Array, batch: Batch
) -> TrainState:
    """A new state at step 0; only shapes are read from the batch."""
    return state_from_variables(method, optimizer, method.init(rng, batch))
