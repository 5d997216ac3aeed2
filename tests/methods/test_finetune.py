import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.finetune import VARIANTS
from mim_jax import config as configs
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.initial import initialize_from
from mim_jax.method import method_class, parameter_shapes
from mim_jax.methods.finetune import FineTune
from mim_jax.models.conv_vit import ConvViT
from mim_jax.training.experiment import Experiment
from mim_jax.training.optimizer import is_decayed
from mim_jax.training.step import stream_keys
from mim_jax.training.tree import flatten, unflatten

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


CONV_SIZES = {
    "model.size": "",
    "model.widths": (4, 6, 8),
    "model.depths": (1, 1, 2),
    "model.heads": 2,
    "model.patch_sizes": (2, 2, 1),
    "model.num_classes": CLASSES,
    "model.labels": "single",
    "data.image_size": (8, 12),
    "data.channels": 1,
    "compute_dtype": "float32",
}


def build_conv(**changes) -> FineTune:
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return FineTune.build(configs.load("finetune:convmae_b16", {**CONV_SIZES, **fields}))


def build(**changes) -> FineTune:
    return FineTune.build(config_of(**changes))


def images(batch: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, 8, 12, 1)).astype(np.float32)


def labels(batch: int = 4) -> np.ndarray:
    return (np.arange(batch) % CLASSES).astype(np.int32)


@functools.cache
def variables(pool: str = "mean"):
    return redrawn(build(model__pool=pool))


@functools.cache
def conv_variables():
    return redrawn(build_conv())


@functools.cache
def redrawn(method: FineTune):
    """Random parameters, norm scales around 1; nothing is compiled for them."""
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), {"image": images()}))
    random = np.random.default_rng(0)
    values = {
        path: (0.2 * random.normal(size=leaf.shape) + path.endswith("scale")).astype(np.float32)
        for path, leaf in flatten(shapes).items()
    }
    return unflatten(values)


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


def test_the_recipes_of_later_papers():
    # Learning rate at batch size 256, or 0 and the rate itself; layer decay, drop path, epochs.
    table = {
        "cae_b16": (0, 8e-3, 4096, 0.65, 0.1, 100),
        "cae_l16": (0, 2e-3, 4096, 0.75, 0.2, 50),
        "cae_v2_b16": (0, 2e-4, 1024, 0.75, 0.1, 100),
        "cae_v2_s16": (0, 4e-4, 1024, 0.75, 0.1, 200),
        "cae_v2_t16": (0, 4e-3, 1024, 0.85, 0.0, 100),
        "maskalign_b16": (3e-4, 0, 1024, 0.55, 0.2, 100),
        "maskalign_l16": (3e-4, 0, 1024, 0.75, 0.4, 50),
        "convmae_b16": (5e-4, 0, 1024, 0.65, 0.1, 100),
        "dmjd_b16": (5e-4, 0, 1024, 0.65, 0.1, 100),
        "dmjd_l16": (5e-4, 0, 1024, 0.75, 0.2, 50),
        "locality_b16": (0, 3e-4, 1024, 0.7, 0.1, 50),
    }
    for variant, (base, rate, batch, decay, drop_path, epochs) in table.items():
        c = configs.load(f"finetune:{variant}")
        assert (c.optimizer.lr or c.optimizer.base_lr) == (rate or base), variant
        assert (c.optimizer.lr > 0) == (rate > 0), variant
        assert (c.batch_size, c.epochs, c.optimizer.weight_decay) == (batch, epochs, 0.05)
        assert (c.model.layer_decay, c.model.drop_path) == (decay, drop_path), variant
        bare = variant in ("cae_b16", "cae_l16")
        assert (c.data.augment == "") == bare and any(c.data.color_jitter) == bare, variant
    assert configs.load("finetune:locality_b16").optimizer.clip_norm == 3.0


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("adapt", "tiny")])
def test_every_recipe_s_classifier_can_be_built(variant):
    fields = {"model.num_classes": 10, "compute_dtype": "float32"}
    method = FineTune.build(configs.load(f"finetune:{variant}", fields))
    encoder = method.model.encoder
    assert isinstance(encoder, ConvViT) == variant.startswith(("convmae", "dmjd"))
    assert encoder.transformer.logit_cap == (30 if variant.startswith("locality") else None)
    grid = encoder.grid if variant.startswith("cae") else None
    assert encoder.transformer.position_bias == grid
    large = variant.endswith(("l16", "l14", "336"))
    assert encoder.transformer.depth == (
        {"vit_h14": 32}.get(variant) or (24 if large else 12) - isinstance(encoder, ConvViT)
    )


def test_a_fresh_classifier_is_near_indifferent():
    method = build()
    fresh = method.init(jax.random.key(0), {"image": images()})
    logits = method.logits(fresh, jnp.asarray(images()))
    assert logits.shape == (4, CLASSES)
    assert np.abs(logits).max() < 0.01  # head of N(0, 2e-5^2)


@pytest.mark.parametrize("pool", ["mean", "cls", "block"])
def test_only_the_pool_s_own_norm_exists(pool):
    paths = set(flatten(variables(pool)["params"]))
    assert ("fc_norm/scale" in paths) == (pool == "mean")
    assert ("encoder/norm/scale" in paths) == (pool != "mean")
    assert ("block_pool/norm/scale" in paths) == (pool == "block")


def test_the_block_pools_all_tokens_and_knows_their_places():
    method = build(model__pool="block")
    tokens = np.random.default_rng(1).normal(size=(2, 7, 16)).astype(np.float32)

    def pooled(tokens):
        return method.model.apply(variables("block"), tokens, method=type(method.model).pooled)

    changed = tokens.copy()
    changed[:, 0] = tokens[:, 1]  # in place of the class token
    assert np.abs(pooled(tokens) - pooled(changed)).max() > 1e-3
    assert np.abs(pooled(tokens) - pooled(tokens[:, ::-1])).max() > 1e-3


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


@pytest.mark.parametrize("pool", ["mean", "cls", "block"])
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
        ({"model__pool": "max"}, "model.pool is 'max'; known are mean, cls, block"),
        ({"model__encoder": "resnet"}, "model.encoder is 'resnet'; known are vit, conv_vit"),
        ({"model__family": "ViT"}, "model.family is 'ViT'; known are mae, vit, cae, clip"),
        (
            {"model__family": "siglip", "model__position_bias": True},
            "family 'siglip' have no class token",
        ),
        ({"model__family": "siglip", "model__pool": "cls"}, "this encoder has no class token"),
        ({"model__labels": "both"}, "model.labels is 'both'; known are single, multi"),
        ({"model__drop_path": 1.5}, "drop_path is 1.5"),
        ({"data__image_size": (8, 13)}, "not divisible"),
    ],
)
def test_what_does_not_fit_together_is_an_error_when_built(changes, message):
    with pytest.raises(ValueError, match=message):
        method = build(**changes)
        method.init(jax.random.key(0), {"image": images()})


def test_a_hybrid_encoder_has_no_class_token_to_pool():
    with pytest.raises(ValueError, match="is 'cls', but this encoder has no class token"):
        build_conv(model__pool="cls")


def test_a_hybrid_classifier_averages_all_tokens_and_has_no_fusion():
    method = build_conv()
    features = method.features(conv_variables(), {"image": images()})
    assert features.tokens.shape == (4, math.prod(features.grid), 8) and features.grid == (2, 3)
    paths = set(flatten(conv_variables()["params"]))
    assert not any("fusion" in path or "cls_token" in path for path in paths)
    assert method.encoder is None  # it is no ViT


def test_convolutional_stages_have_the_lowest_rate():
    method = build_conv(model__layer_decay=0.5)
    scale = functools.partial(method.rate_scale, shape=(4,))
    for name in ("stage1_embed/norm/scale", "stage2_blocks_0/conv1/kernel", "positions"):
        assert scale(f"encoder/{name}") == 0.5**3
    assert scale("encoder/transformer/blocks_0/norm1/scale") == 0.5**2
    assert scale("encoder/transformer/blocks_1/norm1/scale") == 0.5
    assert scale("fc_norm/scale") == scale("head/kernel") == 1.0


def test_only_the_last_block_of_all_stages_is_dropped_at_the_full_rate():
    method = build_conv(model__drop_path=0.5)  # 0, 1/6, 1/3 and 1/2
    noise = jnp.full((4, 2, 4), 0.4)  # drops where the rate is above 0.4

    def logits(changed: str):
        params = flatten(conv_variables()["params"])
        name = f"encoder/transformer/blocks_{changed}/mlp/fc2/kernel"
        params[name] = params[name][::-1]
        return method.logits({"params": unflatten(params)}, jnp.asarray(images()), noise)

    plain = method.logits(conv_variables(), jnp.asarray(images()), noise)
    np.testing.assert_array_equal(logits("1"), plain)
    assert np.abs(logits("0") - plain).max() > 1e-3


def test_a_hybrid_classifier_s_loss_draws_for_the_blocks_of_all_stages():
    method = build_conv(model__drop_path=0.5)
    batch = {"image": images(), "label": labels()}
    values = [
        method.loss(
            conv_variables(),
            batch,
            stream_keys(jax.random.key(seed), method.streams),
            jnp.asarray(seed),
        )[0]
        for seed in (0, 1)
    ]
    assert np.isfinite(values).all() and values[0] != values[1]


def test_weights_for_another_size_resize_the_positions_of_a_hybrid_encoder():
    donor, method = build_conv(), build_conv(data__image_size=(16, 16))
    given = flatten(conv_variables()["params"])
    adopted = {path: method.adopt(path, given, donor) for path in given}
    assert adopted["encoder/positions"].shape == (16, 8)
    for path in set(given) - {"encoder/positions"}:
        np.testing.assert_array_equal(adopted[path], given[path], err_msg=path)


def test_weights_of_a_plain_vit_are_none_for_a_hybrid_encoder():
    given = flatten(variables()["params"])
    assert build_conv().adopt("encoder/norm/scale", given, build()) is None


CAE = dict(model__family="cae", model__layer_scale=0.1)


@pytest.mark.parametrize("scan", [False, True])
def test_cae_s_pre_trained_norm_becomes_that_of_the_mean_and_tables_start_at_zero(scan):
    donor = build(model__pool="cls", **CAE)
    method = build(model__position_bias=True, model__scan=scan, **CAE)
    given = flatten(redrawn(donor)["params"])
    shapes = flatten(redrawn(method))
    for name, leaf in shapes.items():
        path = name.removeprefix("params/")
        value = method.adopt(path, given, donor)
        assert value.shape == leaf.shape, path
        if path.endswith("position_bias/table"):
            assert not value.any() and leaf.shape[-2:] == (3 * 5 + 3, 2)
    for part in ("scale", "bias"):
        adopted = method.adopt(f"fc_norm/{part}", given, donor)
        np.testing.assert_array_equal(adopted, given[f"encoder/norm/{part}"])
    # In MAE's code the norm of the mean is new.
    assert build().adopt("fc_norm/scale", flatten(variables("cls")["params"]), build()) is None


@pytest.mark.parametrize(
    ("pretraining", "changes"),
    [
        ("mae:tiny", {}),
        ("maskalign:tiny", {}),
        ("mr_mae:tiny", {}),
        ("dmjd:tiny", {}),
        ("cae:tiny", {"model.family": "cae", "model.position_bias": True}),
        (
            "locality_alignment:tiny",
            {"model.family": "vit", "model.logit_cap": 30.0, "model.width": 64},
        ),
        ("mr_mae:mcmae_b16", {}),
        ("dmjd:convvit_b16", {}),
    ],
)
def test_the_encoder_of_every_pre_training_method_can_be_fine_tuned(pretraining, changes):
    hybrid = pretraining.endswith("_b16")
    recipe = "finetune:tiny"
    if hybrid:
        recipe = "finetune:dmjd_b16" if pretraining.startswith("dmjd") else "finetune:convmae_b16"
    fields = {"compute_dtype": "float32"}
    config = configs.load(pretraining, fields)
    donor = method_class(config.method).build(config)
    given = {
        path: np.broadcast_to(np.float32(0), leaf.shape)
        for path, leaf in flatten(parameter_shapes(donor)).items()
    }
    classes = {"model.num_classes": CLASSES}
    method = FineTune.build(configs.load(recipe, {**fields, **classes, **changes}))
    for path, leaf in flatten(parameter_shapes(method)).items():
        value = method.adopt(path, given, donor)
        if path.startswith("encoder/"):
            assert value is not None and value.shape == leaf.shape, path
        else:
            assert value is None or value.shape == leaf.shape, path


def test_layer_scale_may_be_new_to_pre_trained_blocks():
    donor, method = build(), build(model__layer_scale=0.3)
    given = flatten(variables()["params"])
    path = "encoder/transformer/blocks_1/layer_scale2/scale"
    np.testing.assert_array_equal(method.adopt(path, given, donor), np.full(16, 0.3, np.float32))


@pytest.mark.parametrize("family", ["cae", "mae"])
def test_a_pre_training_file_is_read_by_its_encoder_alone(family):
    """As CAE's (with the norm) and Locality Alignment's (without) are laid out."""
    changes = dict(model__family=family, model__position_bias=True)
    pretrained = build(model__pool="cls", model__family=family)
    params = redrawn(pretrained)["params"]
    state = pretrained.layout().save(params)
    file = {f"encoder.{key}": value for key, value in state.items()}
    extra = ("alignment_encoder.cls_token", "mask_token", "decoder.head.weight", "rd_pos_embed")
    file |= {key: np.zeros(3, np.float32) for key in extra}
    method = build(model__num_classes=3, **changes).sized_like(file, {})
    found = flatten(method.layout().load(file, redrawn(method)["params"]))
    assert ("fc_norm/scale" in found) == (family == "cae")
    if family == "cae":
        np.testing.assert_array_equal(found["fc_norm/scale"], params["encoder"]["norm"]["scale"])
    encoder = {path: value for path, value in found.items() if path.startswith("encoder/")}
    assert len(encoder) == len(flatten(params["encoder"])) - 2  # all but the norm
    for path, value in encoder.items():
        np.testing.assert_array_equal(value, flatten(params)[path], err_msg=path)
    left_out = method.layout().left_out(file)
    assert set(extra) | {"encoder.head.weight"} <= set(left_out)


def test_biases_of_queries_and_values_do_not_decay_and_tables_do():
    method = build(model__position_bias=True, **CAE)
    for path, leaf in flatten(redrawn(method)["params"]).items():
        decays = is_decayed(path, leaf, method.no_decay)
        if "attention" in path:
            assert decays == path.endswith(("kernel", "table")), path
        if "layer_scale" in path:
            assert not decays, path


def test_bounded_attention_differs_where_logits_are_large_alone():
    logits = {
        cap: build(model__logit_cap=cap).logits(variables(), jnp.asarray(images()))
        for cap in (0.0, 1e4, 0.01)
    }
    np.testing.assert_allclose(logits[1e4], logits[0.0], atol=1e-5)
    assert np.abs(logits[0.01] - logits[0.0]).max() > 1e-3


def test_a_tower_of_clip_keeps_its_norm_before_the_blocks_and_its_activation():
    method = build(model__family="clip", model__pool="block", model__logit_cap=30.0)
    encoder = method.encoder
    assert encoder.pre_norm and not encoder.patch_bias and encoder.learned_positions
    assert encoder.transformer.activation == "quick_gelu" and encoder.transformer.epsilon == 1e-5
    params = redrawn(method)["params"]
    state = method.layout().save(params)
    assert {"norm_pre.weight", "attn_pool.blocks.0.attn.qkv.weight"} <= set(state)
    again = method.layout().load(state, params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert method.layer_of("encoder/pre_norm/scale") == 0
    assert method.layer_of("block_pool/positions") == 3


def test_the_shared_table_of_beit_has_a_place_in_its_file():
    method = build(model__family="beit")
    params = redrawn(method)["params"]
    state = method.layout().save(params)
    assert state["rel_pos_bias.relative_position_bias_table"].shape == (3 * 5 + 3, 2)
    assert state["rel_pos_bias.relative_position_index"].shape == (7, 7)
    again = method.layout().load(state, params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
