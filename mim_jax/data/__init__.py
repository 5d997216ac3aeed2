"""Data: sources by name, crops, and batches as a pure function of (seed, step)."""

from mim_jax.data.pipeline import evaluation_batches, steps_per_epoch, train_batches
from mim_jax.data.sources import Source, open_source
from mim_jax.data.transforms import EvaluationCrop, RandomResizedCrop

__all__ = [
    "EvaluationCrop",
    "RandomResizedCrop",
    "Source",
    "evaluation_batches",
    "open_source",
    "steps_per_epoch",
    "train_batches",
]
