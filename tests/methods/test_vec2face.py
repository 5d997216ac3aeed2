"""Vec2Face: masks, who learns from which loss, generation, attribute search, configs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.generation.attribute_search import (
    Attribute,
    AttributeSearch,
    pose,
    quality,
    yaw_of_rotation,
)
from mim_jax.generation.identities import (
    ordered_noise,
    perturb,
    perturbed,
    sample_identities,
    separable,
)
from mim_jax.masking import MaskRate, nested_masking
from mim_jax.method import variable_shapes
from mim_jax.methods.vec2face import Vec2Face
from mim_jax.models.transformer import DROPOUT
from mim_jax.training.optimizer import build_optimizer, build_schedules
from mim_jax.training.state import split_trainable
from mim_jax.training.tree import flatten

SMALL = {
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "model.decoder_depth": 1,
    "model.decoder_heads": 2,
    "model.image_decoder_inputs": 8,
    "model.image_decoder_widths": (8, 8, 16),
    "model.image_decoder_groups": 4,
    "model.discriminator_widths": (8, 8, 8),
    "model.discriminator_groups": 4,
    "model.discriminator_start": 3,
    "model.face_model.blocks": (1, 1),
    "model.face_model.widths": (4, 8),
    "model.face_model.outputs": 12,
    "model.face_model.path": "",
    "data.image_size": (16, 16),
    "compute_dtype": "float32",
    "batch_size": 4,
}


def config_of(**changes):
    return configs.load("vec2face:tiny", {**SMALL, **changes})


@functools.cache
def method_of(*changes) -> Vec2Face:
    return Vec2Face.build(config_of(**dict(changes)))


@functools.cache
def variables_of(*changes):
    """Initial variables, none of them zero, so that no mistake can hide behind zeros."""
    method = method_of(*changes)
    init = jax.jit(lambda key: method.init(key, {"image": jnp.zeros((1, 16, 16, 3))}))
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda p: (
            np.abs(p) + 0.05 * random.random(p.shape, np.float32)
            if p.ndim < 2
            else p + 0.05 * random.standard_normal(p.shape, np.float32)
        ),
        jax.device_get(init(jax.random.key(0))),
    )


def batch_of(size: int = 4):
    random = np.random.default_rng(1)
    return {"image": random.uniform(-1, 1, (size, 16, 16, 3)).astype(np.float32)}


def streams():
    return {"mask": jax.random.key(1), DROPOUT: jax.random.key(2)}


@functools.cache
def gradient_function(*changes):
    method = method_of(*changes)

    @jax.jit
    def run(variables, batch, step):
        def loss(params):
            return method.loss({"params": params}, batch, streams(), step)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return run


def largest(tree) -> float:
    return max(float(np.max(np.abs(x))) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("masked", [5, 9, 16])
def test_dropped_tokens_are_a_part_of_the_masked_ones_and_counts_are_exact(masked):
    noise = jax.random.uniform(jax.random.key(0), (3, 16))
    masking = nested_masking(noise, 5, masked)
    assert masking.keep_ids.shape == (3, 11)
    np.testing.assert_array_equal(masking.mask.sum(1), masked)
    dropped = np.ones((3, 16))
    np.put_along_axis(dropped, np.asarray(masking.keep_ids), 0, 1)
    assert np.all(masking.mask >= dropped)
    assert np.all(np.diff(masking.keep_ids, axis=1) > 0)


def test_drawn_shares_follow_a_truncated_normal_and_no_clipped_one():
    rate = MaskRate(0.5, 1.0, 0.75)
    shares = np.asarray(rate.draw(jax.random.uniform(jax.random.key(0), (4000,))))
    assert shares.min() >= 0.5 and shares.max() <= 1
    assert np.mean(shares > 0.999) < 0.01  # a clipped normal has 16 % there
    assert abs(shares.mean() - 0.75) < 0.01
    assert rate.smallest(49) == 25


def test_the_vector_itself_is_never_masked_and_with_all_masked_only_it_counts():
    method, variables = method_of(), variables_of()
    vectors = jax.random.normal(jax.random.key(3), (2, 12))

    def image(share, seed, spread):
        params = jax.tree.map(lambda x: x, variables["params"])
        spread_ = params["generator"]["tokens"]["spread"]
        params["generator"]["tokens"]["spread"] = jax.tree.map(lambda x: spread * x, spread_)
        noise = jax.random.uniform(jax.random.key(seed), (2, method.tokens))
        masking = method.masks_of_share(method.mask_rate, noise, share)
        return np.asarray(method.forward({"params": params}, vectors, masking).image)

    # What the other tokens hold is nowhere to be seen; only which of them are dropped could be.
    np.testing.assert_array_equal(image(1.0, 0, 1.0), image(1.0, 0, 2.0))
    assert np.abs(image(0.5, 0, 1.0) - image(0.5, 0, 2.0)).max() > 1e-3
    # The vector is seen through everything that is masked.
    first = image(1.0, 0, 1.0)
    assert np.abs(first[0] - first[1]).max() > 1e-3


def test_target_of_tokens_has_no_gradient():
    method, variables = method_of(), variables_of()
    vectors = jax.random.normal(jax.random.key(3), (2, 12))
    masking = method.draw_masks(method.mask_rate, jax.random.key(0), 2)

    def target(params):
        return method.forward({"params": params}, vectors, masking).tokens.target.sum()

    assert largest(jax.jit(jax.grad(target))(variables["params"])["generator"]) == 0


def test_adversarial_terms_begin_at_their_step():
    run = gradient_function()
    (_, before), early = run(variables_of(), batch_of(), 2)
    (loss, after), late = run(variables_of(), batch_of(), 3)
    assert before.metrics["d_loss"] == 0 and after.metrics["d_loss"] > 0
    assert largest(early["discriminator"]) == 0 and largest(late["discriminator"]) > 0
    assert before.metrics["ae_loss"] == before.metrics["nll"]
    assert after.metrics["ae_loss"] != after.metrics["nll"]
    np.testing.assert_allclose(loss, after.metrics["ae_loss"] + after.metrics["d_loss"], rtol=1e-6)


def test_each_network_learns_from_its_own_loss_only():
    run, leaky = gradient_function(), gradient_function(("model.leak_generator_gradient", True))
    _, gradient = run(variables_of(), batch_of(), 5)
    _, with_leak = leaky(variables_of(), batch_of(), 5)
    method, variables = method_of(), variables_of()
    vectors = method.face_features(variables, batch_of()["image"])
    masking = method.draw_masks(method.mask_rate, streams()["mask"], 4)

    @jax.jit
    def both(params):
        def losses(params):
            images = batch_of()["image"]
            rngs = {DROPOUT: streams()[DROPOUT]}
            output = method.forward({"params": params}, vectors, masking, rngs)
            return method.objective({"params": params}, images, vectors, output, 5)[:2]

        return jax.jacrev(losses)(params)

    of_generator, of_discriminator = both(variables["params"])
    assert largest(of_generator["discriminator"]) == 0
    assert largest(of_discriminator["generator"]) == 0
    for name in ("generator", "discriminator"):
        parts = (of_generator[name], of_discriminator[name])
        for ours, *two in zip(*map(jax.tree.leaves, (gradient[name], *parts))):
            np.testing.assert_allclose(ours, sum(two), atol=1e-5)
    same = zip(*(jax.tree.leaves(g["generator"]) for g in (gradient, with_leak)))
    for ours, other in same:
        np.testing.assert_allclose(ours, other, atol=1e-5)
    difference = jax.tree.map(np.subtract, with_leak["discriminator"], gradient["discriminator"])
    assert largest(difference) > 1e-4


def test_layers_that_nothing_calls_are_frozen_and_have_no_gradient():
    _, gradient = gradient_function()(variables_of(), batch_of(), 5)
    unused = {k: v for k, v in flatten(gradient).items() if "unused_" in k}
    assert len(unused) == 4 and largest(unused) == 0
    trainable, fixed = split_trainable(method_of(), variables_of()["params"])
    assert set(unused) <= set(flatten(fixed))
    assert {path.split("/")[0] for path in flatten(trainable)} == {"generator", "discriminator"}
    assert any(path.startswith("face_model/batch_stats/") for path in flatten(fixed))


def test_the_discriminators_rate_never_changes():
    config, method = config_of(), method_of()
    schedules = build_schedules(config, method.groups, steps_per_epoch=10, steps=80)
    assert set(schedules) == {"default", "discriminator"}
    rates = [float(schedules["discriminator"](step)) for step in (0, 40, 79)]
    np.testing.assert_allclose(rates, config.optimizer.lr)
    assert schedules["default"](0) == 0
    trainable, _ = split_trainable(method, variables_of()["params"])
    build_optimizer(config.optimizer, method.groups, schedules).init(trainable)


def test_a_feature_of_the_batch_takes_the_place_of_the_face_model():
    method, variables, batch = method_of(), variables_of(), batch_of()
    own = method.face_features(variables, batch["image"])
    given = method.features(variables, {**batch, "feature": own})
    np.testing.assert_allclose(given.pooled, method.features(variables, batch).pooled, rtol=1e-5)
    assert given.tokens.shape == (4, 16, 16) and given.grid == (4, 4)


def test_generation_is_bounded_and_repeats_itself_by_key():
    method, variables = method_of(), variables_of()
    vectors = 5 * jax.random.normal(jax.random.key(3), (3, 12))
    generate = jax.jit(method.generate)
    first = generate(variables, vectors, jax.random.key(0))
    assert first.shape == (3, 16, 16, 3) and np.abs(first).max() <= 1
    np.testing.assert_array_equal(first, generate(variables, vectors, jax.random.key(0)))
    assert np.abs(first - generate(variables, vectors, jax.random.key(1))).max() > 0


def test_pictures_show_images_beside_generated_ones():
    pictures = method_of().pictures(variables_of(), batch_of(), streams())
    columns = pictures["faces"].columns
    assert list(columns) == ["image", "generated", "noise 0.3", "noise 0.7"]
    assert {x.shape for x in columns.values()} == {(4, 16, 16, 3)}


def test_textbook_shortcut_starts_from_the_input_and_the_official_one_from_the_branch():
    shapes = {
        official: jax.tree.map(np.shape, variables_of(("model.official_shortcut", official)))
        for official in (False, True)
    }
    block = [
        x["params"]["generator"]["image_decoder"]["level1_0"]["shortcut"]["kernel"]
        for x in shapes.values()
    ]
    assert block == [(1, 1, 16, 8), (1, 1, 8, 8)]


def test_official_checkpoint_round_trip_is_exact():
    method, params = method_of(), variables_of()["params"]
    own = {name: params[name] for name in ("generator", "discriminator")}
    state = method.layout().save(own)
    again = flatten(method.layout().load(state, own))
    for path, value in flatten(own).items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)
    alone = {k: v for k, v in state.items() if not k.startswith("model_disc.")}
    assert set(method.layout().load(alone, own)) == {"generator"}


@pytest.mark.parametrize("variant", ["base", "large", "huge", "base_2024", "tiny"])
def test_every_variant_builds(variant):
    method = Vec2Face.build(configs.load(f"vec2face:{variant}", {"compute_dtype": "float32"}))
    assert method.tokens == 49
    assert (method.perceptual is None) == (variant == "tiny")


def test_the_base_model_has_the_published_number_of_parameters():
    method = Vec2Face.build(configs.load("vec2face:base", {"compute_dtype": "float32"}))
    shapes = jax.eval_shape(
        lambda: method.init(jax.random.key(0), {"image": jnp.zeros((1, 112, 112, 3))})
    )["params"]
    count = {
        name: sum(np.prod(x.shape) for x in jax.tree.leaves(shapes[name])) / 1e6
        for name in ("generator", "discriminator")
    }
    assert abs(count["generator"] - 174.1) < 0.06
    assert abs(count["discriminator"] - 6.14) < 0.006


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.mean": (0.4, 0.5, 0.5)}, r"values in \[-1, 1\]"),
        ({"data.image_size": (18, 16)}, "multiples"),
        ({"model.width": 0}, "model.size"),
        ({"model.face_model.blocks": (), "model.face_model.size": "resnet"}, "iresnet100"),
    ],
)
def test_what_does_not_fit_together_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Vec2Face.build(config_of(**changes))


def test_too_many_stages_for_the_image_are_named():
    method = Vec2Face.build(config_of(**{"model.discriminator_widths": (8, 8, 8, 8)}))
    with pytest.raises(ValueError, match="discriminator_widths"):
        variable_shapes(method)


def test_sampled_identities_are_unlike_each_other_and_follow_the_real_ones():
    rng = np.random.default_rng(0)
    basis = rng.standard_normal((6, 24))
    real = rng.standard_normal((200, 6)) @ basis + 0.1
    vectors = sample_identities(np.random.default_rng(1), 12, features=real, threshold=0.6)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.max(np.triu(units @ units.T, 1)) < 0.6
    # They lie in the space that the real ones span around their mean.
    rest = vectors - real.mean(0)
    inside = rest @ np.linalg.pinv(basis) @ basis
    np.testing.assert_allclose(inside, rest, atol=1e-4)
    plain = sample_identities(np.random.default_rng(1), 50, size=128)
    assert plain.shape == (50, 128) and separable(plain, 0.3) == 50
    assert separable(np.repeat(plain[:2], 3, axis=0)) == 2


def test_too_many_identities_for_the_threshold_are_refused():
    with pytest.raises(ValueError, match="raise the threshold"):
        sample_identities(np.random.default_rng(0), 20, size=2, threshold=0.3)
    with pytest.raises(ValueError, match="two identities"):
        sample_identities(np.random.default_rng(0), 2, features=np.ones((1, 4)))


def test_perturbed_vectors_keep_their_norm_and_more_noise_moves_them_farther():
    base = jax.random.normal(jax.random.key(0), (1000, 64))
    moved = perturb(jax.random.key(1), base)
    lengths = [jnp.linalg.norm(x, axis=1) for x in (base, moved)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    cosine = np.asarray((base * moved).sum(1) / lengths[0] ** 2)
    expected = 1 / np.sqrt(1 + np.square([0.3, 0.5, 0.7]))
    nearest = np.abs(cosine[:, None] - expected).argmin(1)
    shares = np.bincount(nearest, minlength=3) / 1000
    np.testing.assert_allclose(shares, (0.4, 0.4, 0.2), atol=0.1)
    assert np.ptp(nearest[:50]) == 2  # strengths are shuffled over the rows


def test_rows_beyond_the_shares_join_the_last_group_and_wrong_shares_are_named():
    ones = jnp.ones((7, 2))
    noise = ordered_noise(ones, (1.0, 2.0), (0.5, 0.5), jnp.arange(7))
    np.testing.assert_array_equal(noise[:, 0], [1, 1, 1, 2, 2, 2, 2])
    with pytest.raises(ValueError, match="add up to 1"):
        ordered_noise(ones, (1.0, 2.0), (0.5, 0.4), jnp.arange(7))
    np.testing.assert_allclose(perturbed(ones, jnp.zeros((7, 2))), ones, rtol=1e-6)


def linear_search(limit: float, **fields) -> AttributeSearch:
    """A generator of images of one row, whose pixels are the vector itself."""

    def generate(vectors, call):
        return vectors[:, None, :, None]

    def features(images):
        return images.reshape(len(images), -1)

    bright = Attribute(lambda images: jax.nn.relu(2 - images.mean(axis=(1, 2, 3))), limit)
    return AttributeSearch(generate, features, (bright,), **fields)


@pytest.mark.parametrize("counted", [1, 4])
def test_attribute_search_with_satisfied_limits_runs_as_many_steps_as_asked(counted):
    search = linear_search(limit=10.0, counted_steps=counted)
    vectors = jnp.ones((2, 8)) + 0.1 * jax.random.normal(jax.random.key(0), (2, 8))
    _, images, end = jax.jit(search.run)(vectors)
    assert end.steps == end.counted == counted and images.shape == (2, 1, 8, 1)


def test_attribute_search_reaches_its_limit_keeps_the_identity_and_always_ends():
    vectors = jnp.ones((2, 8)) + 0.1 * jax.random.normal(jax.random.key(0), (2, 8))
    found, _, end = jax.jit(linear_search(limit=0.2).run)(vectors)
    assert 1 < end.steps < 100 and end.counted == 1
    assert found.mean() > 1.8
    assert end.terms.identity <= 0.3
    _, _, endless = jax.jit(linear_search(limit=-1.0, max_steps=7).run)(vectors)
    assert endless.steps == 7 and endless.counted == 0


def test_attributes_measure_what_they_are_named_for():
    images = jnp.zeros((2, 1, 1, 1))
    short = quality(lambda x: jnp.array([[3.0, 4.0], [30.0, 40.0]]), target=27.0)
    np.testing.assert_allclose(short.penalty(images), [22, 0])
    turned = pose(lambda x: jnp.array([-40.0, 10.0]), target=45.0)
    np.testing.assert_allclose(turned.penalty(images), [5, 35])
    angle = np.deg2rad(30)
    rotation = jnp.array(
        [[[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]]
    )
    np.testing.assert_allclose(yaw_of_rotation(rotation), [30], rtol=1e-5)
