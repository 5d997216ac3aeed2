"""Training of a small face model: IResNet under an ArcFace head (Deng et al., CVPR 2019).

What the faces of a data set are worth is told by how well a model that saw nothing else verifies
other people.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mim_jax.models.iresnet import IResNet

TINY_FACE_MODEL = IResNet((28, 28), 3, blocks=(1, 1, 1), widths=(16, 32, 64), outputs=64)
"""For images of 28 x 28 pixels."""

WEIGHT_DECAY = 5e-4

Variables = dict[str, Any]


def arcface_logits(
    vectors: jax.Array, centres: jax.Array, labels: jax.Array, margin: float, scale: float
) -> jax.Array:
    """Scaled cosines, with the angle to the true class widened: s cos(theta + m) (equation 3).

    Beyond the angle pi - m, where that would fall no more, s (cos theta - m sin m) is taken, as
    the authors' code does.

    Args:
        vectors: `[batch, size]`, of any length.
        centres: of the classes, `[classes, size]`.
        labels: int `[batch]`.
        margin: m, in radians.
        scale: s.

    Returns:
        float32 `[batch, classes]`.
    """
    units = [
        x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        for x in (vectors, centres)
    ]
    cosine = jnp.clip(units[0] @ units[1].T, -1 + 1e-6, 1 - 1e-6)
    widened = cosine * jnp.cos(margin) - jnp.sqrt(1 - cosine**2) * jnp.sin(margin)
    fallen = cosine - margin * jnp.sin(margin)
    hard = jnp.where(cosine > jnp.cos(jnp.pi - margin), widened, fallen)
    true_class = jax.nn.one_hot(labels, len(centres), dtype=bool)
    return scale * jnp.where(true_class, hard, cosine)


def train_face_model(
    model: IResNet,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epochs: int = 30,
    batch_size: int = 64,
    lr: float = 0.1,
    margin: float = 0.3,
    scale: float = 16.0,
    seed: int = 0,
) -> Variables:
    """Trains a face model from scratch: SGD with momentum, a cosine to 0, random flips.

    The scale of the last norm stays at one, so all components of the vectors are alike.

    Args:
        model: of the size of the images.
        images: uint8 `[n, height, width, channels]`.
        labels: integers `[n]`, the identities.
        epochs: passes over the images.
        batch_size: images of a step; what is left over of a pass is passed over.
        lr: first learning rate.
        margin: of `arcface_logits`, in radians.
        scale: of `arcface_logits`.
        seed: of the weights, the order and the flips.

    Returns:
        `params` and `batch_stats` of the model.

    Raises:
        ValueError: fewer than two identities, or fewer images than one batch has.
    """
    identities, labels = np.unique(labels, return_inverse=True)
    if len(identities) < 2 or len(images) < batch_size:
        raise ValueError(
            f"{len(images)} images of {len(identities)} identities do not train a face model; it "
            f"needs two identities, and batch_size {batch_size} images."
        )
    per_epoch = len(images) // batch_size
    for_model, for_centres = jax.random.split(jax.random.key(seed))
    variables = model.init(for_model, _scaled(images[:1]))
    shape = (len(identities), model.outputs)
    parameters = {
        "model": variables["params"],
        "centres": 0.01 * jax.random.normal(for_centres, shape),
    }
    optimizer = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(optax.cosine_decay_schedule(lr, epochs * per_epoch), momentum=0.9),
    )

    def loss(parameters: Variables, statistics: Variables, batch: jax.Array, true: jax.Array):
        given = {"params": parameters["model"], "batch_stats": statistics}
        vectors, changed = model.apply(given, batch, train=True, mutable=["batch_stats"])
        logits = arcface_logits(vectors, parameters["centres"], true, margin, scale)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, true)
        return jnp.mean(cross_entropy), changed["batch_stats"]

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(parameters, statistics, state, batch, true):
        gradient, statistics = jax.grad(loss, has_aux=True)(parameters, statistics, batch, true)
        changes, state = optimizer.update(gradient, state, parameters)
        changes["model"]["vector_norm"]["scale"] *= 0
        return optax.apply_updates(parameters, changes), statistics, state

    rng = np.random.default_rng(seed)
    statistics, state = variables["batch_stats"], optimizer.init(parameters)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, per_epoch * batch_size, batch_size):
            rows = order[start : start + batch_size]
            batch = images[rows]
            flipped = rng.random(batch_size) < 0.5
            batch = np.where(flipped[:, None, None, None], batch[:, :, ::-1], batch)
            parameters, statistics, state = update(
                parameters, statistics, state, _scaled(batch), labels[rows]
            )
    return {"params": parameters["model"], "batch_stats": statistics}


def face_vectors(
    model: IResNet, variables: Variables, images: np.ndarray, *, batch_size: int = 250
) -> np.ndarray:
    """Vectors of a face model, float32 `[n, outputs]`, not normalized.

    Args:
        model: of the size of the images.
        variables: `params` and `batch_stats`.
        images: uint8 `[n, height, width, channels]`.
        batch_size: images of a forward pass.
    """
    apply = jax.jit(model.apply)
    parts = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        filled = np.zeros((batch_size, *images.shape[1:]), np.uint8)
        filled[: len(batch)] = batch
        parts.append(np.asarray(apply(variables, _scaled(filled)))[: len(batch)])
    return np.concatenate(parts)


def _scaled(images: np.ndarray) -> np.ndarray:
    """uint8 images as float32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1
