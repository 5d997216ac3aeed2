"""Evaluation protocols that work for any method through its features."""

from mim_jax.evaluation.attentive_probe import (
    AttentiveHead,
    AttentiveProbe,
    attentive_probe_accuracy,
)
from mim_jax.evaluation.classification import classification_scores, predict
from mim_jax.evaluation.confusion import confusion, confusion_picture
from mim_jax.evaluation.features import extract_features, raw_pixels
from mim_jax.evaluation.knn import knn_accuracy
from mim_jax.evaluation.linear_probe import LinearProbe, lars_probe_accuracy, linear_accuracy
from mim_jax.evaluation.patch_probe import macro_recall, patch_global_recall, patch_local_recall
from mim_jax.evaluation.probe import Probe, ProbeHead
from mim_jax.evaluation.protocols import PROTOCOLS, compare_with_baselines, evaluate

__all__ = [
    "PROTOCOLS",
    "AttentiveHead",
    "AttentiveProbe",
    "LinearProbe",
    "Probe",
    "ProbeHead",
    "attentive_probe_accuracy",
    "classification_scores",
    "compare_with_baselines",
    "confusion",
    "confusion_picture",
    "evaluate",
    "extract_features",
    "knn_accuracy",
    "lars_probe_accuracy",
    "linear_accuracy",
    "macro_recall",
    "patch_global_recall",
    "patch_local_recall",
    "predict",
    "raw_pixels",
]
