import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax import config as configs
from mim_jax.method import variable_shapes
from mim_jax.methods.tip import LOSSES, TIP, reconstruction
from mim_jax.models.table_encoder import BLOCKED, TableEncoder, hidden_keys
from mim_jax.models.transformer import Transformer
from mim_jax.training.derived import derive
from mim_jax.training.state import split_trainable
from mim_jax.training.tree import flatten

CATEGORIES, CONTINUOUS, COLUMNS = (3, 2), 3, 5

SIZES = {
    "model.base": 2,
    "model.depths": (1, 1),
    "model.categories": CATEGORIES,
    "model.continuous": CONTINUOUS,
    "model.table_width": 16,
    "model.table_depth": 2,
    "model.fusion_depth": 1,
    "model.projection": 8,
    "data.image_size": (16, 16),
    "compute_dtype": "float32",
}

VIT = {
    "model.size": "",
    "model.width": 12,
    "model.depth": 1,
    "model.heads": 2,
    "model.patch_size": (8, 8),
}


def build(name: str = "tip:tiny", **changes) -> TIP:
    known = configs.leaves(configs.load(name))
    sizes = {field: value for field, value in SIZES.items() if field in known}
    return TIP.build(configs.load(name, {**sizes, **changes}))


def batch_of(rows: int = 4, seed: int = 0) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)

    def table() -> np.ndarray:
        codes = [random.integers(count, size=rows) for count in CATEGORIES]
        return np.stack([*codes, *random.normal(size=(CONTINUOUS, rows))], 1).astype(np.float32)

    return {
        "image": jnp.asarray(random.normal(size=(rows, 16, 16, 3)), jnp.float32),
        "table": jnp.asarray(table()),
        "table_corrupted": jnp.asarray(table()),
        "table_missing": jnp.zeros((rows, COLUMNS), jnp.int32),
    }


@functools.cache
def started():
    method = build()
    variables = jax.jit(lambda: method.init(jax.random.key(0), batch_of()))()
    random = np.random.default_rng(1)
    # No bias is zero, so that no mistake can hide behind zeros.
    params = jax.tree.map(
        lambda p: p + 0.2 * random.normal(size=p.shape).astype(np.float32), variables["params"]
    )
    return method, {**variables, "params": params}


def cells(*hidden: int, rows: int = 4) -> jax.Array:
    return jnp.zeros((rows, COLUMNS), bool).at[:, list(hidden)].set(True)


NOISE = np.random.default_rng(2).gumbel(size=(2, 4, 4)).astype(np.float32)


@functools.cache
def _step():
    method, _ = started()

    @jax.jit
    def step(variables, batch, masked, noise):
        output, statistics = method.forward(variables, batch, masked, noise)
        return method.objective(output, batch, masked), output, statistics

    return step


def step(batch, masked, noise=NOISE):
    return _step()(started()[1], batch, masked, jnp.asarray(noise))


def encode(table, hidden, variables=None):
    """Tokens of the table encoder alone."""
    method, own = started()
    params = {"params": (variables or own)["params"]["table_encoder"]}
    return method.model.table_encoder.apply(params, table, hidden)


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_what_a_masked_cell_holds_changes_neither_tokens_nor_gradients(value):
    method, variables = started()
    table, hidden = batch_of()["table"], cells(0, 3)
    other = table.at[:, jnp.array([0, 3])].set(value)
    np.testing.assert_array_equal(encode(table, hidden), encode(other, hidden))

    def gradient(table):
        def total(params):
            tokens = method.model.table_encoder.apply({"params": params}, table, hidden)
            return jnp.sum(tokens**3)

        return flatten(jax.grad(total)(variables["params"]["table_encoder"]))

    mine, others = gradient(table), gradient(other)
    for path, expected in mine.items():
        np.testing.assert_array_equal(others[path], expected, err_msg=path)
        assert np.all(np.isfinite(expected)), path


def test_a_masked_cell_is_seen_by_no_token_but_its_own():
    table, hidden = batch_of()["table"], cells(1)
    params = dict(started()[1]["params"])
    # Not a constant, which the norm would take out.
    mask_token = np.random.default_rng(5).normal(size=(1, 1, 16))
    params["table_encoder"] = {**params["table_encoder"], "mask_token": jnp.asarray(mask_token)}
    before, after = encode(table, hidden), encode(table, hidden, {"params": params})
    others = np.delete(np.arange(1 + COLUMNS), 1 + 1)
    np.testing.assert_allclose(after[:, others], before[:, others], atol=1e-6)
    assert np.all(np.abs(after[:, 2] - before[:, 2]).max(axis=-1) > 1e-3)


def test_the_class_token_of_a_wholly_masked_table_is_that_of_the_class_token_alone():
    method, variables = started()
    encoder, params = method.model.table_encoder, variables["params"]["table_encoder"]
    tokens = encode(batch_of()["table"], cells(*range(COLUMNS)))
    alone = params["cls_token"] + params["columns_table"][0]
    mean, var = alone.mean(-1, keepdims=True), alone.var(-1, keepdims=True)
    norm = params["norm"]
    alone = (alone - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    expected, _ = encoder.transformer.apply({"params": params["transformer"]}, alone)
    np.testing.assert_allclose(tokens[:, :1], np.repeat(expected, 4, axis=0), atol=1e-5)


def test_negatives_are_never_the_pair_itself_and_may_be_any_other():
    method, _ = started()
    _, output, _ = step(batch_of(), cells(0))
    for weights in np.asarray(output.weights):
        assert np.all(np.diag(weights) == 0)
        assert np.all(weights[~np.eye(4, dtype=bool)] > 0)
    draws = [np.asarray(method.draw(keys(i), 4)[1]) for i in range(200)]
    log_weights = np.log(np.maximum(output.weights, 1e-30))
    drawn = np.stack([np.argmax(log_weights + noise, axis=-1) for noise in draws])
    for side in range(2):
        for row in range(4):
            shares = np.bincount(drawn[:, side, row], minlength=4) / len(drawn)
            weights = np.asarray(output.weights)[side, row]
            np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.12)
            assert shares[row] == 0


def keys(seed: int) -> dict[str, jax.Array]:
    names = TIP.streams
    return dict(zip(names, jax.random.split(jax.random.key(seed), len(names))))


@pytest.mark.parametrize(
    "columns, masked", [(5, 2), (7, 4), (17, 8), (75, 38)], ids=["5", "7", "17", "75"]
)
def test_half_the_cells_of_every_row_are_masked_and_a_half_goes_to_the_even_number(columns, masked):
    method = build(**{"model.continuous": columns - 2})
    assert method.masked == masked
    chosen, _ = method.draw(keys(3), 6)
    assert chosen.dtype == bool
    assert chosen.sum(axis=1).tolist() == [masked] * 6
    assert len({row.tobytes() for row in np.asarray(chosen)}) > 1


def test_reconstruction_counts_masked_cells_alone():
    batch, masked = batch_of(), cells(0, 3)
    (_, metrics), output, _ = step(batch, masked)
    seen = batch["table"].at[:, 4].add(1).at[:, 1].set(0)

    def terms(values, numbers, table, counted=masked):
        return reconstruction(values, numbers, table, counted, CATEGORIES)

    numbers = output.numbers.at[:, jnp.array([0, 2])].add(9)
    changed = terms(output.values.at[:, 1].add(5), numbers, seen)
    for name, value in changed.items():
        np.testing.assert_allclose(value, metrics[name], rtol=1e-5, err_msg=name)
    moved = terms(output.values, output.numbers + 1, batch["table"])
    assert moved["loss_mtr_continuous"] != metrics["loss_mtr_continuous"]


def test_no_masked_cell_of_a_kind_costs_nothing_rather_than_nan():
    batch = batch_of()
    for hidden, free in (((0, 1), "continuous"), ((2, 3, 4), "categorical")):
        (loss, metrics), _, _ = step(batch, cells(*hidden))
        assert metrics[f"loss_mtr_{free}"] == 0
        assert np.isfinite(loss)


def test_missing_cells_are_hidden_and_have_no_target():
    batch, masked = batch_of(), cells(0, 3)
    batch["table_missing"] = cells(3).astype(jnp.int32)
    (loss, metrics), _, _ = step(batch, masked)
    assert metrics["loss_mtr_continuous"] == 0
    for name in ("table", "table_corrupted"):
        batch[name] = batch[name].at[:, 3].set(np.nan)
    (again, _), _, _ = step(batch, masked)
    np.testing.assert_array_equal(again, loss)
    assert np.isfinite(loss)


def test_the_order_of_the_batch_orders_the_logits_and_nothing_else():
    batch, masked = batch_of(), cells(0, 3)
    order = np.array([2, 0, 3, 1])
    (loss, _), before, _ = step(batch, masked)
    shuffled = {name: array[order] for name, array in batch.items()}
    noise = NOISE[:, order][:, :, order]
    (again, _), after, _ = step(shuffled, masked, noise)
    expected = before.similarity[order][:, order]
    np.testing.assert_allclose(after.similarity, expected, rtol=1e-4, atol=1e-4)
    # Of pairs, of tables with other images, and of images with other tables.
    matching = before.matching.reshape(3, 4, 2)[:, order]
    np.testing.assert_allclose(after.matching.reshape(3, 4, 2), matching, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(again, loss, rtol=1e-4)


def test_contrast_is_symmetric_when_both_directions_weigh_the_same():
    method, _ = started()
    similarity = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
    forth, back = (method._contrastive(x)[0] for x in (similarity, similarity.T))
    np.testing.assert_allclose(forth, back, rtol=1e-6)
    uneven = dataclasses.replace(method, image_share=0.8)
    assert uneven._contrastive(similarity)[0] != uneven._contrastive(similarity.T)[0]


def test_a_batch_of_one_pair_is_refused():
    method, variables = started()
    with pytest.raises(ValueError, match="batch_size / accumulate"):
        method.loss(variables, batch_of(1), keys(0), jnp.zeros((), jnp.int32))


def test_the_mean_of_the_chosen_losses_is_the_objective():
    _, variables = started()
    batch, zero = batch_of(), jnp.zeros((), jnp.int32)
    for objectives in (("itc",), ("itc", "itm"), LOSSES):
        method = build(**{"model.objectives": objectives})
        loss, aux = method.loss(variables, batch, keys(0), zero)
        terms = [aux.metrics[f"loss_{name}"] for name in objectives]
        np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-6)
        assert ("mtr_top1" in aux.metrics) == ("mtr" in objectives)
        assert set(aux.mutable) == {"batch_stats"}


@pytest.mark.parametrize("objectives", [("itc",), ("mtr",)])
def test_parts_that_no_objective_trains_are_frozen(objectives):
    _, variables = started()
    method = build(**{"model.objectives": objectives})
    trained, fixed = split_trainable(method, variables["params"])

    def loss(params):
        everything = {**variables, "params": params}
        return method.loss(everything, batch_of(), keys(0), jnp.zeros((), jnp.int32))[0]

    gradients = flatten(jax.jit(jax.grad(loss))(variables["params"]))
    sizes = collections.Counter()
    for path, gradient in gradients.items():
        sizes[path.split("/")[0]] += float(jnp.abs(gradient).sum())
    assert {part for part, size in sizes.items() if size == 0} == set(fixed)
    assert set(fixed).isdisjoint(trained) and fixed


def test_hidden_keys_are_finite_in_every_type():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        term = hidden_keys(cells(0, 2), dtype).astype(dtype)
        assert bool(jnp.all(jnp.isfinite(term)))
        assert float(term.min()) <= -65504
    assert float(hidden_keys(cells(0), jnp.float32).min()) == BLOCKED


def test_bfloat16_gives_about_the_same_loss():
    _, variables = started()
    batch, masked = batch_of(), cells(0, 3)
    half = build(compute_dtype="bfloat16")
    output, _ = jax.jit(half.forward)(variables, batch, masked, jnp.asarray(NOISE))
    loss, _ = half.objective(output, batch, masked)
    (expected, _), exact, _ = step(batch, masked)
    assert output.fused.dtype == jnp.bfloat16
    if np.array_equal(output.negatives, exact.negatives):
        np.testing.assert_allclose(loss, expected, rtol=0.1)
    assert loss.dtype == jnp.float32
    assert np.isfinite(loss)


def test_features_see_the_table_where_there_is_one():
    method, variables = started()
    batch = batch_of()
    both = method.features(variables, batch)
    alone = method.features(variables, {"image": batch["image"]})
    assert both.pooled.shape == (4, 16)
    assert alone.pooled.shape == (4, method.model.encoder.width)
    assert both.tokens.shape[1] == both.grid[0] * both.grid[1]
    np.testing.assert_allclose(alone.pooled, alone.tokens.mean(axis=1), atol=1e-5)
    hidden = {**batch, "table_missing": cells(*range(COLUMNS))}
    same = {**hidden, "table": hidden["table"] + 1}
    np.testing.assert_array_equal(
        method.features(variables, hidden).pooled, method.features(variables, same).pooled
    )


def test_pictures_show_masked_categorical_cells():
    method, variables = started()
    picture = method.pictures(variables, batch_of(), keys(0))["cells"]
    assert list(picture.columns) == ["image", "true", "predicted"]
    masked = np.asarray(method.draw(keys(0), 4)[0])[:, : len(CATEGORIES)]
    true = np.asarray(picture.columns["true"])[..., 0]
    assert true.shape == (4, 16, 16)
    lit = true.reshape(4, len(CATEGORIES), -1).max(axis=-1) == 1
    np.testing.assert_array_equal(lit, masked)


def test_a_vit_takes_the_place_of_the_resnet():
    method = build("tip:dvm_vit_s", **VIT, **{"data.image_size": (16, 16)})
    batch = batch_of()
    variables = jax.jit(method.init)(jax.random.key(0), batch)
    assert set(variables) == {"params"}
    loss, aux = jax.jit(method.loss)(variables, batch, keys(0), 0)
    assert np.isfinite(loss)
    assert aux.mutable == {}
    features = method.features(variables, {"image": batch["image"]})
    assert features.tokens.shape == (4, 4, 12)
    table = method.layout()
    saved = table.save(table.joined(variables))
    assert {"encoder_imaging.ln_post.weight", "encoder_imaging.pos_embed"} <= set(saved)
    found = build("tip:dvm_vit_s", **{**VIT, "model.depth": 2}).sized_like(saved, {"heads": 2})
    assert found.model.encoder == method.model.encoder
    again = table.parted(table.load(saved, table.joined(variable_shapes(method))))
    for path, value in flatten(again).items():
        np.testing.assert_array_equal(value, flatten(variables)[path], err_msg=path)


def test_matrices_of_the_transformers_start_small_and_normal():
    method = build(**{"model.table_width": 64})
    variables = jax.jit(lambda: method.init(jax.random.key(0), batch_of()))()
    for path, value in flatten(variables["params"]).items():
        part, name = path.partition("/")[0], path.rpartition("/")[2]
        if part in ("table_encoder", "fusion", "predictor") and name == "kernel":
            assert abs(float(jnp.std(value)) - 0.02) < 0.01, path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.objectives": ("itc", "mim")}, "itc, itm, mtr"),
        ({"model.objectives": ()}, "one or more"),
        ({"model.mask_ratio": 0.05}, "masks 0 of 5 columns"),
        ({"model.table_heads": 3}, "not divisible by table_heads 3"),
        ({"model.encoder": "resnet34"}, "known are resnet18, resnet50, vit"),
        ({"model.categories": (), "model.continuous": 0}, "no table tells them"),
    ],
)
def test_what_does_not_fit_together_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_tables_and_files_of_other_columns_are_refused():
    method, variables = started()
    encoder = TableEncoder((2,), 1, 8, Transformer(1, 2))
    with pytest.raises(ValueError, match="3 columns; the model has 1 categorical"):
        encoder.init(jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros((1, 3), bool))
    saved = method.layout().save(method.layout().joined(variables))
    with pytest.raises(ValueError, match="5 columns and 5 categorical values"):
        build(**{"model.categories": (4, 2)}).sized_like(saved, {})
    with pytest.raises(ValueError, match="no model of TIP"):
        method.sized_like({"cls_token": np.zeros(3)}, {})


def test_the_schema_of_the_data_tells_the_columns(tmp_path):
    config, settings = derive(configs.load("tip:tiny"), tmp_path)
    told = {setting.field: setting.value for setting in settings}
    assert told == {"model.categories": (4, 3, 2, 5), "model.continuous": 4}
    assert TIP.build(configs.resolve(config, "cpu")).model.table_encoder.columns == 8
    with pytest.raises(ValueError, match="has no table"):
        derive(configs.load("tip:tiny", {"data.source": "embedded"}), tmp_path)


@pytest.mark.parametrize("variant", ["dvm", "cardiac", "dvm_resnet18", "dvm_vit_s", "dvm_vit_b"])
def test_published_variants_build(variant):
    columns = {"model.categories": (22, 13, 3, 12), "model.continuous": 13}
    method = TIP.build(configs.load(f"tip:{variant}", columns))
    assert method.masked == 8
    widths = {"dvm_resnet18": 512, "dvm_vit_s": 384, "dvm_vit_b": 768}
    assert method.model.encoder.width == widths.get(variant, 2048)
    assert method.model.encoder.grid == ((8, 8) if "vit" in variant else (4, 4))
