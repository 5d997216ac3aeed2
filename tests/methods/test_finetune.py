import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.initial import initialize_from
from mim_jax.methods.finetune import FineTune
from mim_jax.training.experiment import Experiment
from mim_jax.training.step import stream_keys
from mim_jax.training.tree import flatten

CLASSES = 5
SIZES = {
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.patch_size": (4, 4),
    "model.num_classes": CLASSES,
    "model.labels": "single",
    "data.image_size": (8, 12),
    "compute_dtype": "float32",
    "batch_size": 8,
}


def config_of(**changes):
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return configs.load("finetune:tiny", {**SIZES, **fields})


def build(**changes) -> FineTune:
    return FineTune.build(config_of(**changes))


def images(batch: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, 8, 12, 1)).astype(np.float32)


def labels(batch: int = 4) -> np.ndarray:
    return (np.arange(batch) % CLASSES).astype(np.int32)


@functools.cache
def variables(pool: str = "mean"):
    method = build(model__pool=pool)
    random = np.random.default_rng(0)
    given = method.init(jax.random.key(0), {"image": images()})
    return jax.tree.map(lambda p: p + 0.1 * random.normal(size=p.shape).astype(np.float32), given)


def loss(method: FineTune, step: int = 0, label=None):
    batch = {"image": images(), "label": labels() if label is None else label}
    rngs = stream_keys(jax.random.key(step), method.streams)
    return method.loss(variables(method.model.pool), batch, rngs, jnp.asarray(step))


def test_the_paper_s_recipes():
    table = {"vit_b16": (5e-4, 0.65, 0.1, 100), "vit_l16": (1e-3, 0.75, 0.2, 50)}
    table["vit_h14"] = (1e-3, 0.75, 0.3, 50)
    for variant, (rate, decay, drop_path, epochs) in table.items():
        c = configs.load(f"finetune:{variant}")
        assert (c.optimizer.base_lr, c.epochs) == (rate, epochs)
        assert (c.model.layer_decay, c.model.drop_path) == (decay, drop_path)
        assert (c.batch_size, c.schedule.warmup_epochs, c.schedule.min_lr) == (1024, 5, 1e-6)
        assert (c.model.mixup, c.model.cutmix, c.model.smoothing, c.model.erasing) == (
            0.8,
            1.0,
            0.1,
            0.25,
        )
        assert c.data.augment == "rand-m9-mstd0.5-inc1"


def test_a_fresh_classifier_is_near_indifferent():
    method = build()
    fresh = method.init(jax.random.key(0), {"image": images()})
    logits = method.logits(fresh, jnp.asarray(images()))
    assert logits.shape == (4, CLASSES)
    assert np.abs(logits).max() < 0.01  # head of N(0, 2e-5^2)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_only_the_pool_s_own_norm_exists(pool):
    paths = set(flatten(variables(pool)["params"]))
    assert ("fc_norm/scale" in paths) == (pool == "mean")
    assert ("encoder/norm/scale" in paths) == (pool == "cls")


def test_the_mean_pool_ignores_the_class_token_of_the_last_block():
    method = build()
    tokens = np.random.default_rng(1).normal(size=(2, 7, 16)).astype(np.float32)
    changed = tokens.copy()
    changed[:, 0] += 1
    pooled = [
        method.model.apply(variables(), t, method=type(method.model).pooled)
        for t in (tokens, changed)
    ]
    np.testing.assert_array_equal(*pooled)


def test_evaluation_draws_nothing_and_training_draws_by_its_keys():
    method = build(model__drop_path=0.5, model__mixup=0.8, model__erasing=1.0)
    once, again, other = loss(method, 0)[0], loss(method, 0)[0], loss(method, 1)[0]
    assert once == again != other
    features = [method.features(variables(), {"image": images()}).pooled for _ in range(2)]
    np.testing.assert_array_equal(*features)


def test_plain_loss_is_smoothed_cross_entropy_with_its_accuracy():
    method = build(model__smoothing=0.1)
    value, aux = loss(method)
    logits = np.asarray(method.logits(variables(), jnp.asarray(images())))
    log_p = np.asarray(jax.nn.log_softmax(logits))
    target = np.full((4, CLASSES), 0.1 / CLASSES)
    target[np.arange(4), labels()] += 0.9
    np.testing.assert_allclose(value, -(target * log_p).sum(1).mean(), rtol=1e-5)
    np.testing.assert_allclose(aux.metrics["top1"], np.mean(logits.argmax(1) == labels()))


def test_multi_label_data_get_a_binary_cross_entropy_for_each_class():
    method = build(model__labels="multi")
    assert method.inputs["label"].shape == (CLASSES,)
    label = np.eye(CLASSES, dtype=np.uint8)[labels()] | np.eye(CLASSES, dtype=np.uint8)[0]
    value, aux = loss(method, label=label)
    logits = np.asarray(method.logits(variables(), jnp.asarray(images())), np.float64)
    wanted = np.log1p(np.exp(-logits)) * label + np.log1p(np.exp(logits)) * (1 - label)
    np.testing.assert_allclose(value, wanted.mean(), rtol=1e-5)
    assert aux.metrics == {}


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_the_official_fine_tuned_checkpoint_goes_round_exactly(pool):
    method = build(model__pool=pool)
    params = variables(pool)["params"]
    state = method.layout().save(params)
    assert state["pos_embed"].shape == (1, 7, 16)
    again = method.layout().load(state, params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_fine_tuned_file_of_other_classes_gives_all_but_the_classifier(tmp_path):
    path = tmp_path / "x.safetensors"
    write_state_dict(path, build().layout().save(variables()["params"]))
    experiment = Experiment.build(
        config_of(model__num_classes=3), examples=64, devices=jax.devices()[:1]
    )
    state = experiment.initial_state(experiment.batch_shapes())
    ours, notes = initialize_from(str(path), experiment.method, state)
    np.testing.assert_array_equal(
        ours.params["encoder"]["positions"], variables()["params"]["encoder"]["positions"]
    )
    assert notes[1:] == [
        "not used by this model: head/bias, head/kernel",
        "not in the weights, so at their initial values: head/bias, head/kernel",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_classes": 0}, "model.num_classes is 0, and no labelled data tell it"),
        ({"model__pool": "max"}, "model.pool is 'max'; known are mean, cls"),
        ({"model__labels": "both"}, "model.labels is 'both'; known are single, multi"),
        ({"model__drop_path": 1.5}, "drop_path is 1.5"),
        ({"data__image_size": (8, 13)}, "not divisible"),
    ],
)
def test_what_does_not_fit_together_is_an_error_when_built(changes, message):
    with pytest.raises(ValueError, match=message):
        method = build(**changes)
        method.init(jax.random.key(0), {"image": images()})
