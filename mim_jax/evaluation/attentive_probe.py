"""The attentive probe of CAE: one query attends to all tokens of a frozen encoder.

Chen et al., 2024, "Context Autoencoder for Self-Supervised Representation Learning", section 4.2:
unlike a linear probe it asks for what the patches hold, not the class token alone.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import ml_collections
import optax

from mim_jax.evaluation.features import all_tokens
from mim_jax.evaluation.labelled_data import labelled_source
from mim_jax.evaluation.probe import Probe, ProbeHead, probe_accuracy, train_probe
from mim_jax.method import Features, Method, Variables
from mim_jax.models.pooling import AttentivePool, attention_heads
from mim_jax.training.optimizer import Schedule, scale_by_step_schedule

STEPS_PER_EPOCH = 32
"""Fewest steps that an epoch should have: small data get smaller batches, not fewer steps."""

SMALLEST_BATCH = 64
"""Below it, the statistics of the batch norm become noise."""


class AttentiveHead(nn.Module):
    """`AttentivePool`, batch norm without affine parameters, linear layer.

    Attributes:
        num_classes: number of logits.
        heads: attention heads of the query; 0 takes `attention_heads`.
    """

    num_classes: int
    heads: int = 0

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        """Logits float32 `[batch, classes]` of tokens `[batch, tokens, width]`; see `ProbeHead`."""
        heads = self.heads or attention_heads(tokens.shape[-1])
        pooled = AttentivePool(heads, name="pool")(tokens)
        return ProbeHead(self.num_classes, epsilon=1e-5, name="classifier")(pooled, train=train)


@dataclasses.dataclass(frozen=True)
class AttentiveProbe(Probe):
    """An `AttentiveHead` on the tokens of another method; `pool` plays no part."""

    @property
    def head(self) -> AttentiveHead:
        """The query with its classifier."""
        return AttentiveHead(self.num_classes)

    def represent(self, features: Features) -> jax.Array:
        """All tokens, float32 `[batch, tokens, width]`."""
        return all_tokens(features)


def attentive_probe_accuracy(
    method: Method,
    variables: Variables,
    config: ml_collections.ConfigDict,
    *,
    batch_size: int = 8192,
    epochs: float = 90.0,
    lr: float = 0.4,
    seed: int | None = None,
) -> float:
    """Top-1 accuracy in [0, 1] of CAE's attentive probe, trained on the config's labelled data.

    SGD with Nesterov's momentum 0.9 and no weight decay; the rate is warmed up over a ninth of the
    epochs (10 of 90) and brought to 0 by a cosine; crops and flips as in `train_probe`. The
    defaults are the paper's, for the million images of ImageNet. Where they would leave fewer than
    `STEPS_PER_EPOCH` steps an epoch, the batch is made smaller, down to `SMALLEST_BATCH`, and the
    rate with its square root; this is our choice.

    Args:
        method: gives the tokens, see `evaluation.features.all_tokens`.
        variables: of the method, on any devices; they are not changed.
        config: names data and crop in `data` and `evaluate`.
        batch_size: rounded down to what the devices divide.
        epochs: passes over the training split.
        lr: largest learning rate, at the batch size above.
        seed: of the classifier, the order and the crops; None takes `config.seed`.

    Raises:
        ValueError: for data without labels, fewer examples than devices, or features that are
            not finite.
    """
    examples = len(labelled_source(config, config.evaluate.train_split)[0])
    probe = AttentiveProbe.of(method, config)
    trained = train_probe(
        probe,
        variables,
        config,
        probe_optimizer,
        batch_size=min(batch_size, max(examples // STEPS_PER_EPOCH, SMALLEST_BATCH)),
        epochs=epochs,
        peak_lr=lambda batch: lr * math.sqrt(batch / batch_size),
        seed=config.seed if seed is None else seed,
    )
    return probe_accuracy(probe, trained, config)


def probe_optimizer(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """SGD with Nesterov's momentum 0.9 and no weight decay (CAE code).

    Args:
        schedule: learning rate by step.
    """
    nesterov = optax.trace(decay=0.9, nesterov=True)
    return optax.with_extra_args_support(optax.chain(nesterov, scale_by_step_schedule(schedule)))
