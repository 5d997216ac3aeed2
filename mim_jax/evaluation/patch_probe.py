"""Patch-level probes: what each frozen token knows of its own patch, and of the whole image.

Covert et al., 2025, "Locality Alignment Improves Vision-Language Models", section 4 and appendix:
a linear layer or one transformer block on the frozen patch tokens predicts the class of every
patch ("local") or the classes of the image ("global"); the score is the recall, averaged over the
classes. The paper takes the classes of patches from the semantic labels of MSCOCO; here they are
those of the segmentation maps that a source has.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from sklearn.metrics import recall_score

from mim_jax import losses
from mim_jax.data.segmentation import IGNORED_PATCH
from mim_jax.evaluation.features import TOKENS, extract_features
from mim_jax.evaluation.labelled_data import centre_crops, knows_patches, patch_crops
from mim_jax.method import Method, Variables
from mim_jax.models.pooling import TransformerPool, attention_heads, pooling_blocks

HEADS = {"linear": 1e-2, "block": 1e-3}
"""What reads the tokens, each by itself or together in a block with positions of its own; and the
first learning rate of its training."""

IGNORED = IGNORED_PATCH
"""Label of a patch that has no class."""


class PatchHead(nn.Module):
    """Perhaps a `TransformerPool`, then a linear layer.

    Attributes:
        num_classes: number of logits.
        kind: one of `HEADS`.
        pooled: classify the mean of the tokens instead of each.
    """

    num_classes: int
    kind: str
    pooled: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits `[batch, tokens, classes]`, or pooled `[batch, classes]`, of tokens."""
        if self.kind == "block":
            blocks = pooling_blocks(attention_heads(tokens.shape[-1]))
            tokens = TransformerPool(blocks, name="pool")(tokens)
        if self.pooled:
            tokens = tokens.mean(axis=1)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="linear")(
            tokens
        )


def patch_local_recall(
    train_tokens: np.ndarray,
    train_labels: np.ndarray,
    test_tokens: np.ndarray,
    test_labels: np.ndarray,
    *,
    head: str = "linear",
    epochs: int = 50,
    batch_size: int = 64,
    lr: float = 0.0,
    seed: int = 0,
) -> float:
    """Recall of the class of every patch, averaged over the classes, in [0, 1].

    Channels are standardized by the training split; the head is trained by Adam, whose rate falls
    to 0 by a cosine. Both splits are kept in memory.

    Args:
        train_tokens: frozen, `[train examples, tokens, width]`.
        train_labels: integers `[train examples, tokens]`; `IGNORED` where there is none.
        test_tokens: `[test examples, tokens, width]`.
        test_labels: `[test examples, tokens]`.
        head: one of `HEADS`.
        epochs: passes over the training split.
        batch_size: images of a batch.
        lr: first learning rate; 0 takes that of `HEADS`.
        seed: of the head and the order.

    Raises:
        ValueError: arrays that do not fit together or are not finite, no labelled patch, or an
            unknown head.
    """
    for name, tokens, labels in (
        ("train", train_tokens, train_labels),
        ("test", test_tokens, test_labels),
    ):
        if labels.shape != tokens.shape[:2]:
            raise ValueError(
                f"{name} labels are {labels.shape}, but tokens {tokens.shape} need "
                "[examples, tokens]."
            )
        if labels.min(initial=0) < IGNORED or labels.max(initial=IGNORED) < 0:
            raise ValueError(
                f"{name} labels of patches must be classes from 0 on, or {IGNORED} for none; they "
                f"range from {labels.min(initial=0)} to {labels.max(initial=IGNORED)}."
            )
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    logits = _logits(
        PatchHead(classes, head, pooled=False),
        (train_tokens, train_labels),
        test_tokens,
        _loss_of_patches,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
    )
    known = test_labels != IGNORED
    return macro_recall(test_labels[known], logits.argmax(axis=-1)[known])


def patch_global_recall(
    train_tokens: np.ndarray,
    train_labels: np.ndarray,
    test_tokens: np.ndarray,
    test_labels: np.ndarray,
    *,
    head: str = "linear",
    epochs: int = 50,
    batch_size: int = 64,
    lr: float = 0.0,
    seed: int = 0,
) -> float:
    """Recall of the classes of an image from its patch tokens, averaged over the classes.

    As `patch_local_recall`, but for the labels.

    Args:
        train_tokens: frozen, `[train examples, tokens, width]`.
        train_labels: 0 and 1 `[train examples, classes]`, or integers `[train examples]` where
            an image has one class. Of several, those count as found whose probability is above
            one half.
        test_tokens: `[test examples, tokens, width]`.
        test_labels: `[test examples, classes]` or `[test examples]`.
        head: one of `HEADS`.
        epochs: passes over the training split.
        batch_size: images of a batch.
        lr: first learning rate; 0 takes that of `HEADS`.
        seed: of the head and the order.

    Raises:
        ValueError: as for `patch_local_recall`.
    """
    several = train_labels.ndim == 2
    for name, tokens, labels in (
        ("train", train_tokens, train_labels),
        ("test", test_tokens, test_labels),
    ):
        if len(labels) != len(tokens) or labels.shape[1:] != train_labels.shape[1:]:
            raise ValueError(
                f"{name} labels are {labels.shape}; with {len(tokens)} examples they must be "
                "[examples], or [examples, classes] of 0 and 1, the same in both splits."
            )
        if labels.min(initial=0) < 0 or (several and labels.max(initial=0) > 1):
            raise ValueError(
                f"{name} labels range from {labels.min()} to {labels.max()}; they must be "
                + ("0 or 1." if several else "classes from 0 on.")
            )
    largest = int(max(train_labels.max(), test_labels.max()))
    logits = _logits(
        PatchHead(train_labels.shape[1] if several else largest + 1, head, pooled=True),
        (train_tokens, train_labels),
        test_tokens,
        losses.binary_cross_entropy if several else losses.cross_entropy,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
    )
    if not several:
        return macro_recall(test_labels, logits.argmax(axis=-1))
    return macro_recall(test_labels, (logits > 0).astype(int))


def macro_recall(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes of the share of their examples that are found, in [0, 1].

    Classes of which the truth has no example are left out.

    Args:
        truth: integers `[examples]`, or 0 and 1 `[examples, classes]`.
        predicted: of the same shape.

    Raises:
        ValueError: if the truth has no example of any class.
    """
    there = np.flatnonzero(truth.sum(axis=0)) if truth.ndim == 2 else np.unique(truth)
    if not len(there):
        raise ValueError("the test labels have no example of any class.")
    return float(recall_score(truth, predicted, labels=there, average="macro", zero_division=0))


def patch_local(
    method: Method, variables: Variables, config: ml_collections.ConfigDict
) -> dict[str, float]:
    """`patch_local_recall` by each of `HEADS` on the labelled data that the config names.

    Args:
        method: gives the tokens.
        variables: of the method, on any devices.
        config: a complete config; read are `evaluate`, `data` and `seed`.

    Raises:
        ValueError: data that do not tell the classes of patches, see `patch_crops`.
        FileNotFoundError: if the data are not there.
    """
    grid = _grid(method, variables, config)
    crops = [patch_crops(config, split, grid) for split in _splits(config)]
    arrays = _tokens_and_labels(method, variables, config, crops)
    return {head: patch_local_recall(*arrays, head=head, seed=config.seed) for head in HEADS}


def patch_global(
    method: Method, variables: Variables, config: ml_collections.ConfigDict
) -> dict[str, float]:
    """`patch_global_recall` by each of `HEADS` on the labelled data that the config names.

    Where the data tell the class of every pixel, the classes of an image are those of its patches,
    as in the paper; otherwise they are its labels.

    Args:
        method: gives the tokens.
        variables: of the method, on any devices.
        config: a complete config; read are `evaluate`, `data` and `seed`.

    Raises:
        ValueError: data without labels or maps.
        FileNotFoundError: if the data are not there.
    """
    if all(knows_patches(config, split) for split in _splits(config)):
        grid = _grid(method, variables, config)
        crops = [patch_crops(config, split, grid) for split in _splits(config)]
        arrays = _tokens_and_labels(method, variables, config, crops)
        classes = np.arange(max(arrays[1].max(), arrays[3].max(), 0) + 1)
        for place in (1, 3):
            arrays[place] = (arrays[place][..., None] == classes).any(axis=1).astype(np.int32)
    else:
        crops = [centre_crops(config, split) for split in _splits(config)]
        arrays = _tokens_and_labels(method, variables, config, crops)
    return {head: patch_global_recall(*arrays, head=head, seed=config.seed) for head in HEADS}


def _splits(config: ml_collections.ConfigDict) -> tuple[str, str]:
    return config.evaluate.train_split, config.evaluate.test_split


def _grid(
    method: Method, variables: Variables, config: ml_collections.ConfigDict
) -> tuple[int, int]:
    height, width = config.data.image_size
    images = jax.ShapeDtypeStruct((1, height, width, config.data.channels), jnp.float32)
    return tuple(jax.eval_shape(method.features, variables, {"image": images}).grid)


def _tokens_and_labels(
    method: Method,
    variables: Variables,
    config: ml_collections.ConfigDict,
    crops: list[Iterator[dict[str, np.ndarray]]],
) -> list[np.ndarray]:
    """The tokens and labels of one split after another."""
    arrays: list[np.ndarray] = []
    mean, std = config.data.mean, config.data.std
    for batches in crops:
        tokens, labels = extract_features(
            method, variables, batches, mean=mean, std=std, pool=TOKENS
        )
        assert labels is not None, "these batches have labels"
        arrays += [tokens, labels]
    return arrays


def _loss_of_patches(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of `[batch, tokens, classes]` over the patches that have a class."""
    known = (labels != IGNORED).astype(jnp.float32)
    error = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.sum(error * known) / jnp.maximum(jnp.sum(known), 1)


def _logits(
    head: PatchHead,
    train: tuple[np.ndarray, np.ndarray],
    test_tokens: np.ndarray,
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> np.ndarray:
    """Logits of the test tokens by a head that was trained on the others."""
    train_tokens, labels = train
    _check_tokens(head, train_tokens, test_tokens)
    mean = train_tokens.mean(axis=(0, 1), dtype=np.float64)
    deviation = train_tokens.std(axis=(0, 1), dtype=np.float64)
    deviation[deviation == 0] = 1  # a constant channel stays at zero

    def standardized(tokens: np.ndarray) -> jax.Array:
        return jnp.asarray((tokens - mean) / deviation, jnp.float32)

    size = min(batch_size, len(train_tokens))
    steps = len(train_tokens) // size
    random = np.random.default_rng(seed)
    epoch_orders = [random.permutation(len(train_tokens)) for _ in range(epochs)]
    order = np.stack([ids[: steps * size].reshape(steps, size) for ids in epoch_orders])
    optimizer = optax.adam(optax.cosine_decay_schedule(lr or HEADS[head.kind], epochs * steps))

    @jax.jit
    def trained(params: Any, tokens: jax.Array, labels: jax.Array, order: jax.Array) -> Any:
        def step(carry: tuple[Any, Any], ids: jax.Array) -> tuple[tuple[Any, Any], None]:
            params, state = carry

            def loss_of(params: Any) -> jax.Array:
                logits = head.apply({"params": params}, tokens[ids])
                assert isinstance(logits, jax.Array)
                return loss(logits, labels[ids])

            updates, state = optimizer.update(jax.grad(loss_of)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), order)[0][0]

    start = head.init(jax.random.key(seed), jnp.zeros((1, *train_tokens.shape[1:])))["params"]
    params = trained(
        start,
        standardized(train_tokens),
        jnp.asarray(labels.astype(np.int32)),
        jnp.asarray(order.reshape(-1, size)),
    )
    forward = jax.jit(lambda tokens: head.apply({"params": params}, tokens))
    parts = range(0, len(test_tokens), size)
    return np.concatenate([forward(standardized(test_tokens[i : i + size])) for i in parts])


def _check_tokens(head: PatchHead, train: np.ndarray, test: np.ndarray) -> None:
    if head.kind not in HEADS:
        raise ValueError(f"head is {head.kind!r}; known are {', '.join(HEADS)}.")
    if train.ndim != 3 or train.shape[1:] != test.shape[1:] or not len(train) or not len(test):
        raise ValueError(
            f"train tokens {train.shape} and test tokens {test.shape} must be [examples, tokens, "
            "width] of the same encoder, with at least one example."
        )
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        raise ValueError("tokens are not finite; has the training diverged?")
