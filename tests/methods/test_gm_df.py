import dataclasses
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.pretrained import load_pretrained
from mim_jax.data.configured import training_source
from mim_jax.masking import random_masking
from mim_jax.methods.gm_df import GMDF, UNSEEN, Aligned
from mim_jax.training.derived import check_domains, complete_without_data, derive
from mim_jax.training.experiment import Experiment
from mim_jax.training.optimizer import is_decayed
from mim_jax.training.state import TrainState, init_state, split_trainable
from mim_jax.training.tree import flatten, unflatten

DOMAINS, EXPERTS = 3, 3

SIZES = {
    "model.clip.width": 16,
    "model.clip.depth": 2,
    "model.clip.heads": 2,
    "model.clip.outputs": 12,
    "model.clip.patch_size": (4, 4),
    "model.clip.image_size": (8, 12),
    "model.text.width": 8,
    "model.text.depth": 1,
    "model.domains": DOMAINS,
    "model.domain_width": 5,
    "model.experts": EXPERTS,
    "model.expert_hidden": 8,
    "model.second_order_layers": (0,),
    "model.decoder_width": 8,
    "model.decoder_depth": 1,
    "model.decoder_heads": 2,
    "data.image_size": (8, 12),
    "batch_size": 8,
    "compute_dtype": "float32",
}

RNGS = {"mask": jax.random.key(3)}


def config_of(**changes):
    return configs.load("gm_df:tiny", {**SIZES, **changes})


def build(**changes) -> GMDF:
    return GMDF.build(config_of(**changes))


@functools.cache
def variant(name: str) -> GMDF:
    """The tiny method with what a rung of the ladder changes."""
    full, own = (configs.leaves(configs.load(f"gm_df:{x}").model) for x in ("full", name))
    return build(**{f"model.{field}": x for field, x in own.items() if x != full[field]})


def batch_of(rows: int = 8, seed: int = 0) -> dict[str, jax.Array]:
    """Blocks of the domains 2 and 0, in each real before fake."""
    random = np.random.default_rng(seed)
    block = rows // 2
    return {
        "image": jnp.asarray(random.normal(size=(rows, 8, 12, 3)), jnp.float32),
        "label": jnp.asarray(([0] * (block // 2) + [1] * (block // 2)) * 2, jnp.int32),
        "domain": jnp.asarray([2] * block + [0] * block, jnp.int32),
    }


@functools.cache
def start_of(method: GMDF) -> dict[str, Any]:
    return jax.jit(method.init)(jax.random.key(0), batch_of())["params"]


def random_params(method: GMDF) -> dict[str, Any]:
    """Initial ones and noise, so that no mistake can hide behind zeros."""
    start = start_of(method)
    random = np.random.default_rng(1)
    noisy = {
        path: leaf + 0.2 * random.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in flatten(start).items()
    }
    return unflatten(noisy)


@functools.cache
def started():
    method = build()
    return method, random_params(method)


def changed(params, pattern: str, change) -> dict[str, Any]:
    """Parameters with those changed whose path contains a pattern."""
    flat = flatten(params)
    assert any(pattern in path for path in flat), pattern
    return unflatten({path: change(x) if pattern in path else x for path, x in flat.items()})


@functools.cache
def _detect(method: GMDF):
    return jax.jit(lambda params, batch: method.detect({"params": params}, batch))


def detect(method: GMDF, params, batch=None):
    return _detect(method)(params, batch or batch_of())


def clip_tokens(method: GMDF, params) -> jax.Array:
    """What CLIP's own tower makes of the images."""
    return method.tower.apply({"params": params["visual"]}, batch_of()["image"])[0]


def assert_like_clip(method: GMDF, params) -> None:
    tokens = detect(method, params).seen.normalized
    np.testing.assert_allclose(tokens, clip_tokens(method, params), rtol=2e-4, atol=2e-5)


def test_norms_of_zeros_leave_clip_as_it_was():
    method, params = started()
    assert np.abs(detect(method, params).seen.normalized - clip_tokens(method, params)).max() > 0.1
    silent = changed(params, "/domain_norm/", jnp.zeros_like)
    assert_like_clip(method, changed(silent, "/experts/fc2/", jnp.zeros_like))


def test_norms_in_place_of_both_norms_of_a_block_start_as_clip():
    method = build(**{"model.norm_site": "pre"})
    params = random_params(method)
    silent = changed(params, "/experts/fc2/", jnp.zeros_like)
    silent = changed(silent, "_of_domain/", jnp.zeros_like)
    assert_like_clip(method, silent)
    # As it is at the start, apart from biases and the like.
    start = start_of(method)
    for path, leaf in flatten(start).items():
        if "/experts/fc2/" in path or "_of_domain/" in path:
            assert not np.any(leaf), path
    assert np.abs(detect(method, params).seen.normalized - clip_tokens(method, params)).max() > 0.1


def test_the_order_of_the_experts_has_no_influence():
    method, params = started()
    order = np.array([2, 0, 1])
    mine = detect(method, params)
    other = detect(method, changed(params, "/experts/experts/", lambda x: x[order]))
    np.testing.assert_allclose(other.feature, mine.feature, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(mine.seen.routes, other.seen.routes, strict=True):
        np.testing.assert_allclose(theirs, ours[..., order, :][..., order], rtol=1e-4, atol=1e-5)
        assert np.abs(theirs - ours).max() > 1e-3


def test_attention_over_experts_adds_up_to_one():
    for route in detect(*started()).seen.routes:
        assert route.shape == (8, 1 + 6, EXPERTS, EXPERTS)
        np.testing.assert_allclose(route.sum(axis=-1), 1, rtol=1e-5)


def test_a_gate_starts_as_none_and_then_weighs_experts_by_domain():
    method, params = started()
    gated = build(**{"model.expert_gate": "domain"})
    flat, mine = flatten(random_params(gated)), flatten(params)
    own = {path for path in flat if "/gate/" in path}
    assert set(flat) == set(mine) | own and own
    start = flatten(start_of(gated))
    zeros = unflatten({**mine, **{path: start[path] for path in own}})
    expected = detect(method, params).feature
    np.testing.assert_allclose(detect(gated, zeros).feature, expected, rtol=1e-4, atol=1e-5)
    weighed = detect(gated, unflatten({**mine, **{path: 5 * flat[path] for path in own}})).feature
    assert np.abs(weighed - expected).max() > 1e-3


def test_masked_pass_does_not_see_what_is_under_the_mask():
    method, params = started()
    batch, noise = batch_of(), jax.random.uniform(jax.random.key(5), (8, method.tokens))
    mask = random_masking(noise, method.kept).mask
    assert (mask.sum(axis=1) == method.tokens - method.kept).all()
    hidden = np.asarray(mask).reshape(8, 2, 3).repeat(4, axis=1).repeat(4, axis=2)[..., None] == 1

    @jax.jit
    def reconstruct(images):
        return method.reconstruct({"params": params}, {**batch, "image": images}, mask)

    images, others = batch["image"], batch_of(seed=1)["image"]
    before = reconstruct(images)
    np.testing.assert_array_equal(reconstruct(jnp.where(hidden, 100 * others, images)), before)
    assert np.abs(reconstruct(jnp.where(hidden, images, others)) - before).max() > 1e-2
    # The loss looks at masked patches alone.
    seen = np.repeat(np.asarray(mask)[..., None] == 1, before.shape[-1], axis=-1)
    losses = [
        method.reconstruction_loss(images, jnp.where(where, before + 1, before), mask)
        for where in (np.zeros_like(seen), ~seen, seen)
    ]
    assert losses[0] == losses[1] != losses[2]


def gradient(method: GMDF, params, loss):
    return flatten(jax.jit(jax.grad(loss))(params))


def test_an_inner_step_of_length_zero_is_plain_joint_training():
    _, params = started()
    batch, gradients = batch_of(), {}
    small = {"model.text_weight": 0.0, "model.mask_weight": 0.0, "model.inner_rate": 0.0}
    for order in ("first", "second"):
        method = build(**small, **{"model.meta": order})

        def meta_loss(params, method=method):
            return method.loss({"params": params}, batch, RNGS, jnp.zeros((), jnp.int32))[0]

        gradients[order] = gradient(method, params, meta_loss)
    train, test = method.halves(batch)
    fixed = Aligned(detect(method, params, train).feature, train["label"])
    noise = jax.random.uniform(RNGS["mask"], (4, method.tokens))

    def plain_loss(params):
        return method.objective({"params": params}, test, noise, fixed)[0]

    expected = gradient(method, params, plain_loss)
    for path, value in expected.items():
        for order, ours in gradients.items():
            scale = max(float(np.abs(value).max()), 1e-6)
            np.testing.assert_allclose(
                ours[path], value, rtol=1e-4, atol=1e-4 * scale, err_msg=f"{order} {path}"
            )
    assert np.abs(expected["head/kernel"]).max() > 1e-3


def test_the_last_block_of_a_batch_is_the_meta_test_domain():
    method = build(**{"model.meta_train_domains": 2, "data.domains_per_batch": 3})
    batch = {"image": np.zeros((6, 1)), "domain": np.array([2, 2, 0, 0, 1, 1])}
    train, test = method.halves(batch)
    assert train["domain"].tolist() == [2, 2, 0, 0]
    assert test["domain"].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"8 rows cannot be cut into 3 equal blocks.*batch_size"):
        method.halves({"image": np.zeros((8, 1))})


def test_prompts_of_unseen_domains_are_like_no_others():
    method, params = started()
    texts = np.asarray(jax.jit(method.read)({"params": params}))
    assert texts.shape == (DOMAINS + 1, 2, 12)
    rows = texts.reshape(-1, 12)
    distances = np.abs(rows[:, None] - rows[None]).max(axis=-1)
    assert (distances[~np.eye(len(rows), dtype=bool)] > 1e-3).all()


@functools.cache
def _scores(method: GMDF):
    return jax.jit(lambda params, batch: method.scores({"params": params}, batch))


def test_images_of_unseen_domains_have_no_domain_of_the_training():
    method, params = started()
    method = dataclasses.replace(method, score_of="both")
    image = batch_of()["image"]

    def scores(domain: int) -> np.ndarray:
        return np.asarray(_scores(method)(params, {"image": image, "domain": jnp.full(8, domain)}))

    unseen = scores(UNSEEN)
    np.testing.assert_array_equal(_scores(method)(params, {"image": image}), unseen)
    np.testing.assert_array_equal(scores(DOMAINS), unseen)  # a number that no domain has
    for domain in range(DOMAINS):
        assert np.abs(scores(domain) - unseen).max() > 1e-4
    # Where all domains are alike, their mean is what each is.
    same = changed(params, "domain_embedding", lambda x: jnp.broadcast_to(x[:1], x.shape))
    known = detect(method, same, {"image": image, "domain": jnp.zeros(8, jnp.int32)})
    np.testing.assert_allclose(
        detect(method, same, {"image": image}).logit, known.logit, rtol=1e-4, atol=1e-5
    )


def test_the_score_of_both_is_the_mean_of_logit_and_text():
    method, params = started()
    batch, feature = batch_of(), detect(method, params).feature

    @jax.jit
    def text(params):
        return jax.nn.softmax(method.similarities({"params": params}, feature, batch["domain"]))

    alone = jax.nn.sigmoid(detect(method, params).logit), text(params)[:, 1]
    both = _scores(dataclasses.replace(method, score_of="both"))(params, batch)
    np.testing.assert_allclose(both, (alone[0] + alone[1]) / 2, rtol=1e-4)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3


def test_temperature_is_positive_and_smooth_where_a_domain_token_is_zero():
    method, params = started()
    zeros = changed(params, "domain_tokens", jnp.zeros_like)

    def total(params):
        return method.temperatures({"params": params}).sum()

    tau = method.temperatures({"params": zeros})
    np.testing.assert_allclose(tau, method.temperature[0], rtol=1e-5)
    gradient = jax.grad(total)(zeros)["domain_tokens"]
    assert not np.any(gradient)
    norms = np.linalg.norm(params["domain_tokens"], axis=-1)
    np.testing.assert_allclose(
        method.temperatures({"params": params}), 0.07 + 0.01 * norms, rtol=1e-5
    )


@pytest.mark.parametrize("alignment", ["moments", "w2", "w2_diagonal", "mmd"])
def test_alignment_by_class_passes_over_different_shares_of_the_classes(alignment):
    method = dataclasses.replace(started()[0], alignment=alignment)
    random = np.random.default_rng(2)
    real, fake = (random.normal(shift, 1, (6, 12)).astype(np.float32) for shift in (0, 3))
    fixed = Aligned(jnp.asarray([*real, *fake]), jnp.asarray([0] * 6 + [1] * 6))
    more_fakes = jnp.asarray([*real, *fake, *fake])
    labels = jnp.asarray([0] * 6 + [1] * 12)
    whole = float(method.distance(fixed, more_fakes, labels))
    by_class = dataclasses.replace(method, by_class=True)
    if alignment == "mmd":  # no moments: what comes twice counts as before
        assert abs(float(by_class.distance(fixed, more_fakes, labels))) < 1e-5 < whole
        return
    same = (jnp.asarray([*fake, *real]), jnp.asarray([1] * 6 + [0] * 6))
    assert abs(float(by_class.distance(fixed, *same))) < 1e-3 < whole
    assert float(by_class.distance(fixed, same[0], 1 - same[1])) > 0.1


def test_frozen_clip_is_the_same_to_the_last_bit_after_training():
    changes = {"model.norm_site": "pre", "model.freeze": "clip", "optimizer.lr": 1e-2}
    config = config_of(**changes, **{"steps": 10, "schedule.warmup_epochs": 0.0})
    experiment = Experiment.build(config, 80, jax.devices()[:1])
    method = experiment.method
    assert isinstance(method, GMDF)
    batch = batch_of()
    image = np.random.default_rng(4).integers(256, size=batch["image"].shape, dtype=np.uint8)
    start = jax.jit(lambda: init_state(method, experiment.optimizer, jax.random.key(0), batch))()
    step, state = jax.jit(experiment.train_step()), start
    for _ in range(3):
        state, metrics = step(state, {**batch, "image": image})
    assert int(state.skipped) == 0 and np.isfinite(metrics["loss"])
    before, after = flatten(start.params), flatten(state.params)
    moved = {path for path in before if np.any(np.asarray(before[path]) != after[path])}
    tower = jax.eval_shape(lambda: method.tower.init(jax.random.key(0), batch["image"]))["params"]
    clip = {f"visual/{path}" for path in flatten(tower)} | {"logit_scale"}
    clip |= {path for path in before if path.startswith("text/")}
    # In place of both norms of a block are norms of domains.
    clip -= {path for path in clip if re.search("^visual/.*/norm[12]/", path)}
    assert clip <= set(before)
    assert moved == set(before) - clip


@pytest.mark.parametrize("site", ["output", "pre"])
def test_towers_and_projection_come_from_a_checkpoint_of_clip(site, tmp_path):
    method, params = started()
    state = {
        key.removeprefix("clip."): value
        for key, value in method.layout().save(params).items()
        if key.startswith("clip.")
    }
    path = tmp_path / "clip.safetensors"
    write_state_dict(path, state)
    heads = {"num_attention_heads": 2}
    vision = {**heads, "image_size": [8, 12]}
    about = {"model_type": "clip", "vision_config": vision, "text_config": heads}
    path.with_suffix(".json").write_text(json.dumps(about))
    receiver = build(
        **{"model.clip.path": str(path), "model.freeze": "clip", "model.norm_site": site}
    )
    start = start_of(receiver)
    before = flatten(start)
    loaded, notes = load_pretrained(receiver, TrainState(0, start, {}, None, 0, 0))
    after, given = flatten(loaded.params), flatten(params)
    assert len(notes) == 3
    own = ("/experts/", "/domain_norm/", "_of_domain/", "mask_token")
    for name, value in after.items():
        of_clip = name.startswith(("visual/", "text/")) and not any(part in name for part in own)
        if name == "fusion/projection/kernel":
            expected = given["visual/projection/kernel"]
        else:
            expected = (given if of_clip else before)[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert np.any(after["text/positions"] != before["text/positions"])


@pytest.mark.parametrize(
    "changes",
    [
        {"model.expert_gate": "domain"},
        {"model.norm_site": "pre"},
        {"model.norm_site": "pre", "model.experts": 0, "model.meta": "none"},
        {"model.experts": 0, "model.meta": "none", "model.second_order_layers": ()},
    ],
    ids=["gate", "pre", "pre without experts", "no experts"],
)
def test_every_choice_of_the_adaptation_survives_its_layout(changes):
    if "model.meta" in changes:
        changes = {**changes, "model.alignment_weight": 0.0}
    method, random = build(**changes), np.random.default_rng(6)
    batch = {name: x[:1] for name, x in batch_of().items()}
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), batch))["params"]
    params = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)
    saved = method.layout().save(params)
    assert sum(value.size for value in saved.values()) == sum(
        x.size for x in flatten(shapes).values()
    )
    again = flatten(method.layout().load(saved, shapes))
    for name, value in flatten(params).items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def trained_paths(method: GMDF) -> set[str]:
    batch = {name: x[:1] for name, x in batch_of().items()}
    params = jax.eval_shape(lambda: method.init(jax.random.key(0), batch))["params"]
    return set(flatten(split_trainable(method, params)[0]))


@pytest.mark.parametrize("name", ["clip_joint", "experts", "prompts"])
def test_the_rungs_of_the_ladder_train_exactly_what_its_loss_depends_on(name):
    method = variant(name)
    params = random_params(method)

    def loss(params):
        return method.loss({"params": params}, batch_of(), RNGS, jnp.zeros((), jnp.int32))[0]

    gradients = gradient(method, params, loss)
    assert {path for path, value in gradients.items() if np.any(value)} == trained_paths(method)


def test_text_alone_can_be_frozen_and_classes_told_by_text():
    known = trained_paths(build())
    text = {path for path in known if path.startswith("text/")}
    assert trained_paths(build(**{"model.freeze": "text"})) == known - text
    heads = {"head/kernel", "head/bias"}
    assert heads < known
    assert trained_paths(build(**{"model.logit_of": "text"})) == known - heads


def test_clip_has_a_rate_of_its_own_and_tokens_are_not_decayed():
    method, params = started()
    (group,) = method.groups
    paths = {path for path in flatten(params) if re.search(group.pattern, path)}
    assert any("blocks_0/attention" in path for path in paths)
    own = ("/experts/", "/domain_norm/", "mask_token", "fusion/", "decoder/", "head/", "_tokens")
    assert not any(part in path for part in own for path in paths)
    for path in ("domain_embedding", "domain_tokens", "class_tokens", "decoder/positions"):
        assert not is_decayed(path, flatten(params)[path], method.no_decay)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.batches": "shuffled"}, "data.batches is 'shuffled', but GM-DF needs the domain"),
        (
            {"data.domains_per_batch": 3},
            "data.domains_per_batch is 3, but model.meta_train_domains is 1: .* to 2, or",
        ),
        ({"model.meta_train_domains": 3}, "model.meta_train_domains is 3; .* between 1 and 2"),
        ({"model.domains": 0}, "model.domains is 0: set it to the number"),
        ({"model.experts": 0}, "model.experts is 0, but the meta step trains experts"),
        ({"model.meta": "none"}, "model.alignment_weight is not 0, but only a meta step"),
        ({"model.meta": "third"}, "model.meta is 'third'; known are none, first, second"),
        ({"model.alignment": "coral"}, "known are moments, w2, w2_diagonal, mmd"),
        ({"data.image_size": (8, 8)}, r"model.clip sees images \(8, 12, 3\)"),
        ({"model.clip.outputs": 0}, "model.clip.outputs 0; make them fit"),
        ({"model.second_order_layers": (1, 2)}, r"blocks \(1, 2\), counted from 0, but the tower"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_the_domains_of_the_model_are_those_of_the_data(tmp_path):
    config, settings = derive(config_of(**{"model.domains": 0}), tmp_path)
    assert ("model.domains", 4) in [(setting.field, setting.value) for setting in settings]
    assert complete_without_data(config_of(**{"model.domains": 0})).model.domains == 4
    source = training_source(config)
    check_domains(config, source)
    config.model.domains = 3
    with pytest.raises(ValueError, match=r"model.domains is 3, but 'mix:.*' has 4 domains: synth"):
        check_domains(config, source)
    alone = config_of(**{"model.domains": 0, "data.source": "synthetic:collections:0"})
    with pytest.raises(ValueError, match="'synthetic:collections:0' is no mixture, but this"):
        derive(alone, tmp_path)
