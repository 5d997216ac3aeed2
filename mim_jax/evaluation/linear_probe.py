"""Linear classifiers on a frozen encoder: a fast exact one, and MAE's LARS recipe (appendix A.1).

`linear_accuracy` fits logistic regression to features that were extracted once; it suits small
data. `lars_probe_accuracy` trains `LinearProbe`, which augments the images anew in every epoch, in
the one train step; it is what papers report on ImageNet.
"""

import dataclasses
import warnings

import ml_collections
import numpy as np
import optax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from mim_jax import config as configs
from mim_jax.evaluation.knn import check_features_and_labels
from mim_jax.evaluation.probe import Probe, ProbeHead, probe_accuracy, train_probe
from mim_jax.method import Method, Variables
from mim_jax.training.optimizer import Schedule, build_optimizer

L2_STRENGTH = 1e-2
"""Weight of |w|^2 / 2 against the mean cross-entropy, so it means the same for any data size."""

MAX_ITERATIONS = 500
"""L-BFGS steps; a probe that stops here is as good as converged for an accuracy."""


def linear_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
) -> float:
    """Share of test examples that logistic regression classifies correctly, in [0, 1].

    Multinomial logistic regression by L-BFGS from zero weights, so nothing is random. Features are
    standardized by the training split's statistics, which makes the fixed penalty `L2_STRENGTH`
    mean the same for every encoder. Work and memory grow with the data in one process: for
    millions of examples take `lars_probe_accuracy`.

    Args:
        train_features: `[train examples, width]`.
        train_labels: integers `[train examples]`.
        test_features: `[test examples, width]`.
        test_labels: integers `[test examples]`.

    Raises:
        ValueError: arrays that do not fit together, or fewer than two classes to tell apart.
    """
    check_features_and_labels(train_features, train_labels, test_features, test_labels)
    if len(np.unique(train_labels)) < 2:
        raise ValueError("all training labels are equal; a linear probe needs two classes.")
    train = np.asarray(train_features, np.float64)
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    deviation[deviation == 0] = 1  # a constant feature stays at zero
    classifier = LogisticRegression(
        C=1 / (L2_STRENGTH * len(train)), max_iter=MAX_ITERATIONS, solver="lbfgs"
    )
    # One thread adds up in one order, so the result repeats; and threads of linear algebra that
    # wait for each other make this many times slower on a busy machine.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit((train - mean) / deviation, train_labels)
    predicted = classifier.predict((np.asarray(test_features, np.float64) - mean) / deviation)
    return float(np.mean(predicted == test_labels))


@dataclasses.dataclass(frozen=True)
class LinearProbe(Probe):
    """A linear classifier on one vector for each image."""

    @property
    def head(self) -> ProbeHead:
        """Batch norm and linear layer."""
        return ProbeHead(self.num_classes)


def lars_probe_accuracy(
    method: Method,
    variables: Variables,
    config: ml_collections.ConfigDict,
    *,
    batch_size: int = 16384,
    epochs: float = 90.0,
    base_lr: float = 0.1,
    seed: int | None = None,
) -> float:
    """Top-1 accuracy in [0, 1] of MAE's linear probe, trained on the config's labelled data.

    LARS with momentum 0.9 and no weight decay; rate `base_lr * batch / 256`, warmed up over a
    ninth of the epochs (10 of 90) and brought to 0 by a cosine; random crops of 8 % to 100 % of
    the image, and flips unless `config.data.flip` is off. The defaults are the paper's. They need
    the thousands of steps that ImageNet gives: LARS moves the classifier by 0.1 % of its length at
    rate 1, so on a few thousand images it stops far from the optimum, where `linear_accuracy`
    finds it.

    Other papers take the same recipe with other numbers. CAE: the same. MaskAlign: `base_lr`
    0.025. ConvMAE and DMJD: `batch_size` 4096 (DMJD's large model 50 epochs at `base_lr` 0.05); in
    their code the mean of the tokens before the final norm goes through a LayerNorm that is not
    trained, while here it is the method's `features` as they are.

    Args:
        method: gives the features.
        variables: of the method, on any devices; they are not changed.
        config: names data, crop and pool in `data` and `evaluate`.
        batch_size: a smaller data set is one batch; rounded down to what the devices divide.
        epochs: passes over the training split.
        base_lr: learning rate at batch size 256.
        seed: of the classifier, the order and the crops; None takes `config.seed`.

    Raises:
        ValueError: for data without labels, fewer examples than devices, or features that are
            not finite.
    """
    probe = LinearProbe.of(method, config)
    trained = train_probe(
        probe,
        variables,
        config,
        probe_optimizer,
        batch_size=batch_size,
        epochs=epochs,
        peak_lr=lambda batch: base_lr * batch / 256,
        seed=config.seed if seed is None else seed,
    )
    return probe_accuracy(probe, trained, config)


def probe_optimizer(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """LARS with momentum 0.9, trust coefficient 0.001 and no weight decay (MAE's `util/lars.py`).

    Args:
        schedule: learning rate by step.
    """
    settings = configs.defaults().optimizer
    settings.update(name="lars", momentum=0.9, trust_coefficient=1e-3, weight_decay=0.0)
    return build_optimizer(settings, (), {"default": schedule})
