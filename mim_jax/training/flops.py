"""Floating-point operations of a step, counted from its jaxpr, and the chips' peaks."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""Dense bfloat16 operations per second by a part of `device_kind`, from the vendors' sheets."""


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 operations per second of a chip, or None if it is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def peak_flops_of(device: jax.Device, dtype: str) -> float:
    """Peak operations per second of a device.

    For a chip in the table its bfloat16 peak. For any other (a CPU) the rate of a large matrix
    product of the compute type, measured now, shared by the simulated devices of one CPU.
    """
    known = peak_flops(device.device_kind)
    if known is not None:
        return known
    size = 1024
    matrix = jax.device_put(np.ones((size, size), jnp.dtype(dtype)), device)
    product = jax.jit(lambda x: x @ x)
    product(matrix).block_until_ready()
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        product(matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    neighbours = len(jax.local_devices()) if device.platform == "cpu" else 1
    return 2 * size**3 / min(seconds) / neighbours


def count_flops(function: Any, *arguments: Any) -> float:
    """Operations of all matrix products and convolutions in a function, forward and backward.

    A product of `[m, k]` and `[k, n]` counts `2 m n k`. Loops count as often as they run;
    element-wise work is left out, as is usual for model FLOPs. What rematerialization computes
    again would count as well, so pass a function without it.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: jax_core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(_shape(equation.invars[0])[axis] for axis in contract)
            total += 2 * math.prod(_shape(equation.outvars[0])) * inner
        elif name == "conv_general_dilated":
            kernel = _shape(equation.invars[1])
            out_axis = equation.params["dimension_numbers"].rhs_spec[0]
            per_output = math.prod(kernel) / kernel[out_axis]
            total += 2 * math.prod(_shape(equation.outvars[0])) * per_output
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in equation.params["branches"])
        else:
            repeats = equation.params.get("length", 1) if name == "scan" else 1
            for inner in _inner_jaxprs(equation.params):
                total += repeats * _count(inner)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner_jaxprs(params: dict[str, Any]) -> list[jax_core.Jaxpr]:
    """Jaxprs among an equation's parameters: bodies of loops, calls and custom derivatives."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jax_core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, jax_core.Jaxpr):
                found.append(item)
    return found
