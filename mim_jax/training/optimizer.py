"""Optimizers and the learning-rate schedule, with the rules of the MAE code.

Every transformation is optax's own; this file puts them in the order of the papers' code and adds
one thing that optax lacks: a learning rate read from the train step instead of a private counter,
so that skipped steps and resumed runs see the rate of their step.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mim_jax.method import Group
from mim_jax.training.tree import map_with_path

Schedule = Callable[[jax.Array], jax.Array]

RateScale = Callable[[str, tuple[int, ...]], Any]
"""A factor on the learning rate by the path and shape of a parameter."""

DEFAULT_GROUP = "default"


def warmup_cosine(
    peak: float,
    *,
    min_lr: float,
    warmup_epochs: float,
    epochs: float,
    steps_per_epoch: float,
    by_epoch: bool = False,
) -> Schedule:
    """Linear warm-up from exactly 0, then half a cosine, by the fractional epoch (MAE code).

    With e = step / steps_per_epoch: `peak * e / warmup` before the warm-up ends, and
    `min_lr + (peak - min_lr) * (1 + cos(pi (e - warmup) / (epochs - warmup))) / 2` after it.

    With `by_epoch`, e is the number of the epoch, a whole number, and the warm-up is
    `peak * e / (warmup - 1)`, so that its last epoch has the full rate already
    (`LinearWarmupCosineAnnealingLR` of lightning-bolts).

    Raises:
        ValueError: if the warm-up is not shorter than the training.
    """
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(
            f"schedule.warmup_epochs is {warmup_epochs:g}, but the run has {epochs:g} epochs; "
            "the warm-up must be shorter than the run."
        )

    def rate(step: jax.Array) -> jax.Array:
        epoch = jnp.asarray(step, jnp.float32) / steps_per_epoch
        if by_epoch:
            epoch = jnp.floor(epoch + 1e-6)  # float32 may fall just short of a whole number
        share = (epoch - warmup_epochs) / (epochs - warmup_epochs)
        cosine = min_lr + (peak - min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))
        warmup = peak * epoch / max(warmup_epochs - by_epoch, 1e-9)
        return jnp.where(epoch < warmup_epochs, warmup, cosine)

    return rate


def peak_rate(config: ml_collections.ConfigDict, batch_size: int) -> float:
    """`lr` where it is set, else `base_lr * batch_size / 256`."""
    return config.lr or config.base_lr * batch_size / 256


def is_decayed(
    path: str, leaf: Any, no_decay: Sequence[str] = (), *, decay_all: bool = False
) -> bool:
    """Whether weight decay applies: all but biases, norm scales and other 1-D parameters.

    The rule of timm 0.3.2 that MAE uses. Class and mask tokens have three axes and do decay,
    unless a pattern of `no_decay` is found in their path. The rule goes by name as well, since
    our biases may be split into heads or stacked over blocks. Under `decay_all`, biases and the
    like decay, too; what `no_decay` names does not.
    """
    if any(re.search(pattern, path) for pattern in no_decay):
        return False
    return decay_all or (leaf.ndim > 1 and not path.endswith(("bias", "/scale")))


def decay_mask(no_decay: Sequence[str], *, decay_all: bool = False) -> Callable[[Any], Any]:
    """`is_decayed` as a function of a tree of parameters."""

    def decayed(path: str, leaf: Any) -> bool:
        return is_decayed(path, leaf, no_decay, decay_all=decay_all)

    return lambda params: map_with_path(decayed, params)


class _NoState(NamedTuple):
    """State of a transformation that has none."""


def scale_by_step_schedule(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by `-schedule(step)`, with `step` given to `update` by the train step."""

    def update(updates: Any, state: _NoState, params: Any = None, *, step: jax.Array, **_: Any):
        rate = schedule(step)
        return jax.tree.map(lambda u: -rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: _NoState(), update)


def scale_by_path(rate_scale: RateScale) -> optax.GradientTransformation:
    """Multiplies each update by `rate_scale(path, shape)`: a learning rate for each parameter."""

    def update(updates: Any, params: Any) -> Any:
        return map_with_path(lambda path, u: u * jnp.asarray(rate_scale(path, u.shape)), updates)

    return optax.stateless(update)


def adamw(
    config: ml_collections.ConfigDict, schedule: Schedule, no_decay: Sequence[str] = ()
) -> optax.GradientTransformation:
    """AdamW with decoupled decay on the tensors that `is_decayed` names (PyTorch's update)."""
    mask = decay_mask(no_decay, decay_all=config.decay_all)
    return optax.chain(
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=mask),
        scale_by_step_schedule(schedule),
    )


def adam(
    config: ml_collections.ConfigDict, schedule: Schedule, no_decay: Sequence[str] = ()
) -> optax.GradientTransformation:
    """Adam whose decay is added to the gradient: an L2 penalty (PyTorch's `Adam`)."""
    mask = decay_mask(no_decay, decay_all=config.decay_all)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=mask),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        scale_by_step_schedule(schedule),
    )


def lars(
    config: ml_collections.ConfigDict, schedule: Schedule, no_decay: Sequence[str] = ()
) -> optax.GradientTransformation:
    """LARS as in the MAE code (You et al., 2017, without decay and trust ratio on 1-D tensors).

    `g <- g + decay * w; g <- g * trust * |w| / |g|; m <- momentum * m + g; w <- w - lr * m`.
    `optax.lars` has the rate inside the momentum, which differs once the rate changes.
    """
    mask = decay_mask(no_decay)
    decayed = decay_mask(no_decay, decay_all=config.decay_all)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=config.trust_coefficient), mask),
        optax.trace(decay=config.momentum),
        scale_by_step_schedule(schedule),
    )


OPTIMIZERS = {"adamw": adamw, "adam": adam, "lars": lars}


def group_of(path: str, groups: Sequence[Group]) -> str:
    """Name of the first group whose pattern is found in a path, or "default"."""
    return next((g.name for g in groups if re.search(g.pattern, path)), DEFAULT_GROUP)


def build_optimizer(
    config: ml_collections.ConfigDict,
    groups: Sequence[Group],
    schedules: dict[str, Schedule],
    *,
    no_decay: Sequence[str] = (),
    rate_scale: RateScale | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clipping, each group's own optimizer, then the scale of each parameter.

    Groups of the same `clip_norm` are clipped by the norm of all of them together, as one network
    would be; a group with `clip_alone` by its own.

    Args:
        config: `config.optimizer`.
        groups: the method's optimizer groups.
        schedules: learning rate by group name; "default" is needed always.
        no_decay: patterns of parameters without weight decay, see `is_decayed`.
        rate_scale: the method's factors on the learning rate, see `Method.rate_scale`.

    Raises:
        ValueError: for an unknown optimizer, or settings of a group that does not exist.
    """
    names = [DEFAULT_GROUP, *(group.name for group in groups)]
    unknown = set(config.groups) - set(names)
    if unknown:
        raise ValueError(
            f"optimizer.groups sets {sorted(unknown)}, but the method's groups are {names}."
        )
    transforms, clips, clip_of = {}, {}, {}
    for name in names:
        settings = group_settings(config, groups, name)
        if settings.name not in OPTIMIZERS:
            raise ValueError(
                f"optimizer.name is {settings.name!r}; known are {', '.join(OPTIMIZERS)}."
            )
        transforms[name] = OPTIMIZERS[settings.name](settings, schedules[name], no_decay)
        clip_of[name] = name if settings.clip_alone else f"norm {settings.clip_norm}"
        clips[clip_of[name]] = (
            optax.clip_by_global_norm(settings.clip_norm)
            if settings.clip_norm > 0
            else optax.identity()
        )

    def labels(params: Any) -> Any:
        return map_with_path(lambda path, _: group_of(path, groups), params)

    def clip_labels(params: Any) -> Any:
        return map_with_path(lambda path, _: clip_of[group_of(path, groups)], params)

    parts: list[optax.GradientTransformation] = []
    if groups:
        parts += [optax.partition(clips, clip_labels), optax.partition(transforms, labels)]
    else:
        parts += [*clips.values(), transforms[DEFAULT_GROUP]]
    if rate_scale is not None:
        parts.append(scale_by_path(rate_scale))
    return optax.with_extra_args_support(optax.chain(*parts))


def group_settings(
    config: ml_collections.ConfigDict, groups: Sequence[Group], name: str
) -> ml_collections.ConfigDict:
    """`config.optimizer` as one group sees it: the method's changes, then the user's."""
    settings = config.copy_and_resolve_references().unlock()
    for group in groups:
        if group.name == name:
            settings.update(dict(group.settings))
    settings.update(config.groups.get(name, {}))
    return settings


def build_schedules(
    config: ml_collections.ConfigDict, groups: Sequence[Group], steps_per_epoch: float, steps: int
) -> dict[str, Schedule]:
    """The learning rate of every group as a function of the step.

    Args:
        config: the whole config.
        groups: the method's optimizer groups.
        steps_per_epoch: optimizer steps in an epoch.
        steps: optimizer steps in the run.
    """

    def schedule_of(name: str) -> Schedule:
        settings = group_settings(config.optimizer, groups, name)
        peak = peak_rate(settings, config.batch_size)
        if settings.constant_rate:
            return lambda step: jnp.asarray(peak, jnp.float32)
        return warmup_cosine(
            peak,
            min_lr=config.schedule.min_lr,
            warmup_epochs=config.schedule.warmup_epochs,
            epochs=steps / steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            by_epoch=config.schedule.by_epoch,
        )

    return {name: schedule_of(name) for name in [DEFAULT_GROUP, *(group.name for group in groups)]}
