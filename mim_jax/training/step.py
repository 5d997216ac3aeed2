"""The train step, written once for all methods.

A step is a pure function of (state, batch). Its randomness comes from (seed, step) alone.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mim_jax.method import Batch, Ema, Method
from mim_jax.training import tree
from mim_jax.training.optimizer import DEFAULT_GROUP, Schedule
from mim_jax.training.state import TrainState, split_trainable

Prepare = Callable[[Batch, jax.Array], Batch]
"""What happens to a uint8 batch on the device before the loss: `prepare(batch, rng)`."""

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]

Gradient = Callable[[TrainState, Batch], tuple[Any, dict[str, jax.Array], Any]]
"""From (state, batch): gradient, metrics and mutable collections of one step."""


def stream_keys(rng: jax.Array, streams: tuple[str, ...]) -> dict[str, jax.Array]:
    """One key for each named stream; a key does not depend on which other streams exist."""
    return {name: jax.random.fold_in(rng, zlib.crc32(name.encode())) for name in streams}


def step_key(seed: int, step: jax.Array) -> jax.Array:
    """The key from which all randomness of a step comes."""
    return jax.random.fold_in(jax.random.key(seed), step)


def make_gradient(
    method: Method,
    prepare: Prepare,
    *,
    seed: int,
    accumulate: int = 1,
    gather: Callable[[Any], Any] = lambda params: params,
) -> Gradient:
    """The first half of a step: gradient of the method's loss over the trainable parameters.

    It is averaged over `accumulate` micro-batches. The metrics are `loss` and those of the method.
    `gather` makes of the parameters, as devices hold them, what the loss computes with.
    """

    def micro_step(trainable: Any, fixed: Any, mutable: Any, batch: Batch, rng: jax.Array, step):
        batch = prepare(batch, stream_keys(rng, ("prepare",))["prepare"])
        rngs = stream_keys(rng, method.streams)

        def loss_of(trainable: Any):
            variables = {"params": gather(tree.merge(trainable, fixed)), **mutable}
            return method.loss(variables, batch, rngs, step)

        (loss, aux), gradient = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        return gradient, {"loss": loss, **aux.metrics}, {**mutable, **aux.mutable}

    def gradient_function(state: TrainState, batch: Batch):
        key = step_key(seed, state.step)
        trainable, fixed = split_trainable(method, state.params)
        if accumulate == 1:
            rng = jax.random.fold_in(key, 0)
            return micro_step(trainable, fixed, state.mutable, batch, rng, state.step)
        return _accumulate(
            lambda mutable, micro, i: micro_step(
                trainable, fixed, mutable, micro, jax.random.fold_in(key, i), state.step
            ),
            state.mutable,
            batch,
            accumulate,
        )

    return gradient_function


def make_train_step(
    method: Method,
    optimizer: optax.GradientTransformationExtraArgs,
    schedules: Mapping[str, Schedule],
    prepare: Prepare,
    *,
    seed: int,
    accumulate: int = 1,
    gather: Callable[[Any], Any] = lambda params: params,
) -> TrainStep:
    """The function `(state, batch) -> (state, metrics)`, to be compiled by the caller.

    One step is: the gradient, see `make_gradient`; the optimizer (which clips); EMA. If the loss
    or the gradient is not finite, the parameters, optimizer state and mutable collections stay as
    they are, and the step counts as skipped.

    Metrics are float32 scalars: `loss`, those of the method, `grad_norm` (before clipping),
    `learning_rate` (and `learning_rate_NAME` of other groups), `skipped`, `skipped_in_row`.
    """
    gradient_function = make_gradient(
        method, prepare, seed=seed, accumulate=accumulate, gather=gather
    )

    def step_function(state: TrainState, batch: Batch):
        trainable, fixed = split_trainable(method, state.params)
        gradient, metrics, mutable = gradient_function(state, batch)
        grad_norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, trainable, step=state.step)
        params = tree.merge(optax.apply_updates(trainable, updates), fixed)
        params = follow(method.ema, params, state.step)
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)

        def if_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        new_state = TrainState(
            step=state.step + 1,
            params=if_finite(params, state.params),
            mutable=if_finite(mutable, state.mutable),
            opt_state=if_finite(opt_state, state.opt_state),
            skipped=state.skipped + skipped,
            skipped_in_row=(state.skipped_in_row + 1) * skipped,
        )
        metrics |= {
            "grad_norm": grad_norm,
            "skipped": new_state.skipped,
            "skipped_in_row": new_state.skipped_in_row,
        }
        for name, schedule in schedules.items():
            suffix = "" if name == DEFAULT_GROUP else f"_{name}"
            metrics[f"learning_rate{suffix}"] = schedule(state.step)
        return new_state, {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

    return step_function


def _accumulate(micro_step: Callable, mutable: Any, batch: Batch, count: int):
    """Mean gradient and metrics over micro-batches; mutable collections are handed on."""
    stacked = micro_batches(batch, count)

    def body(carry: tuple[Any, Any, Any], indexed: tuple[Batch, jax.Array]):
        total, metrics, mutable = carry
        gradient, new_metrics, mutable = micro_step(mutable, *indexed)
        total = jax.tree.map(lambda a, b: a + b / count, total, gradient)
        metrics = jax.tree.map(lambda a, b: a + b / count, metrics, new_metrics)
        return (total, metrics, mutable), None

    first = jax.tree.map(lambda x: x[0], stacked)
    shapes = jax.eval_shape(micro_step, mutable, first, jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[:2])
    carry, _ = jax.lax.scan(body, (*zeros, mutable), (stacked, jnp.arange(count)))
    return carry


def micro_batches(batch: Batch, count: int) -> Batch:
    """Micro-batches along a new first axis: `[batch, ...]` -> `[count, batch / count, ...]`.

    Micro-batch i has rows i, i + count, i + 2 * count, ...: neighbouring rows lie on one device,
    so that cutting the batch moves no data.
    """
    return {
        name: array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)
        for name, array in batch.items()
    }


def follow(emas: tuple[Ema, ...], params: Any, step: jax.Array) -> Any:
    """Parameters after every EMA target has moved towards its source."""
    flat = tree.flatten(params)
    for ema in emas:
        momentum = ema.momentum(step) if callable(ema.momentum) else ema.momentum
        for path, source in tree.subtree(params, ema.source).items():
            target = flat[f"{ema.target}/{path}"]
            flat[f"{ema.target}/{path}"] = momentum * target + (1 - momentum) * source
    return tree.unflatten(flat)
