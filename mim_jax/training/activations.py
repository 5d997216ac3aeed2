"""What every module of a forward pass gives: how large it is, and whether it is finite."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Activation:
    """The output of one call of a module.

    Attributes:
        module: its path, `encoder/transformer/blocks_0/mlp`. A module whose calls run in a
            compiled loop (`scan`) has one output for each turn: `blocks[0]`, `blocks[1]`.
        largest: greatest absolute value; NaN if the output holds a NaN.
    """

    module: str
    largest: float

    @property
    def finite(self) -> bool:
        """Whether there is neither NaN nor infinity in the output."""
        return math.isfinite(self.largest)


def activations(function: Callable[..., Any], *args: Any) -> list[Activation]:
    """Compiles and runs a function, and gives all its modules' outputs in the order of execution.

    A module comes after the modules that it calls, so the first one that is not finite is the
    innermost. Outputs without floating-point numbers are left out.

    Args:
        function: pure; it may call Linen modules, also under `scan` and `remat`.
        *args: its arguments.
    """
    modules: list[str] = []  # in the order of tracing, which is that of execution
    values: dict[int, list[float]] = collections.defaultdict(list)

    def observed(
        next_call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        output = next_call(*args, **kwargs)
        computed = _computed(output)
        if computed:
            call = len(modules)
            modules.append(_path(context))
            # Called back, since a value inside of `scan` has no other way out.
            keep = functools.partial(_append, values[call])
            jax.debug.callback(keep, _largest(computed))
        return output

    def run(*args: Any) -> Any:
        with nn.intercept_methods(observed):
            return function(*args)

    jax.block_until_ready(jax.jit(run)(*args))
    jax.effects_barrier()
    # What `scan` traced only to learn its shapes was never executed, and has no value.
    return _in_order([(modules[call], values[call]) for call in sorted(values) if values[call]])


def _largest(arrays: list[jax.Array]) -> jax.Array:
    """The greatest absolute value, NaN if there is one: XLA's maximum on CPU may pass over it."""
    holds_nan = functools.reduce(jnp.logical_or, [jnp.isnan(x).any() for x in arrays])
    largest = [jnp.abs(x).max(initial=0).astype(jnp.float32) for x in arrays]
    return jnp.where(holds_nan, jnp.nan, functools.reduce(jnp.maximum, largest))


def _append(values: list[float], value: jax.Array) -> None:
    values.append(float(value))


def _computed(output: Any) -> list[jax.Array]:
    """Floating-point arrays among what a module gives; constants are NumPy's."""
    arrays = [leaf for leaf in jax.tree.leaves(output) if isinstance(leaf, jax.Array)]
    return [array for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)]


def _path(context: nn.module.InterceptorContext) -> str:
    module = context.module
    path = "/".join(module.path) or type(module).__name__
    return path if context.method_name == "__call__" else f"{path}.{context.method_name}"


def _in_order(calls: list[tuple[str, list[float]]]) -> list[Activation]:
    """Neighbours with several outputs each were in one loop: their outputs come turn by turn."""
    ordered = []
    while calls:
        turns = len(calls[0][1])
        together = 1
        while turns > 1 and together < len(calls) and len(calls[together][1]) == turns:
            together += 1
        for turn in range(turns):
            for name, outputs in calls[:together]:
                ordered.append(Activation(name if turns == 1 else f"{name}[{turn}]", outputs[turn]))
        calls = calls[together:]
    return ordered
