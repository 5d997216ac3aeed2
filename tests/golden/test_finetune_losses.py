"""The losses of fine-tuning against those of the official code."""

import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.losses import cross_entropy, smoothed_targets, soft_cross_entropy
from tests.golden.cases import Case, assert_close, case_params

classifiers = pytest.mark.parametrize("path", case_params("mae", "finetune"))

SMOOTHING = 0.1


@classifiers
def test_losses_of_the_evaluation_logits_match(path):
    case = Case(path)
    logits, labels = case["out/eval_logits"], jnp.asarray(case["in/labels"].astype(np.int32))
    smoothed = smoothed_targets(labels, logits.shape[1], SMOOTHING)
    for name, loss in (
        ("out/eval_soft_ce", soft_cross_entropy(logits, case["in/soft_targets"])),
        ("out/eval_smooth_ce", soft_cross_entropy(logits, smoothed)),
        ("out/eval_ce", cross_entropy(logits, labels)),
    ):
        assert_close(loss, case[name], name)


@classifiers
def test_loss_of_the_training_logits_matches(path):
    case = Case(path)
    loss = soft_cross_entropy(case["out/train_logits"], case["in/soft_targets"])
    assert_close(loss, case["out/loss"], "out/loss")
