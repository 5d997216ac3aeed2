import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mim_jax import config as configs
from mim_jax.conversion.export import export_variables
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.initial import initialize_from, read_donor
from mim_jax.evaluation.classification import classification
from mim_jax.methods.parts.table_image import PARTS
from mim_jax.methods.tip import TIP
from mim_jax.methods.tip_classifier import TIPClassifier
from mim_jax.training.experiment import Experiment
from mim_jax.training.loop import train
from mim_jax.training.state import split_trainable, state_from_variables
from mim_jax.training.tree import flatten
from tests.methods.test_tip import COLUMNS, SIZES, batch_of, cells
from tests.methods.test_tip import started as pretrained

NUM_CLASSES = 3


def fields(**changes) -> dict:
    own = {k: v for k, v in SIZES.items() if k != "model.projection"}
    return {**own, "model.num_classes": NUM_CLASSES, **changes}


def build(**changes) -> TIPClassifier:
    return TIPClassifier.build(configs.load("tip_classifier:tiny", fields(**changes)))


def labelled() -> dict[str, jax.Array]:
    return {**batch_of(), "label": jnp.array([0, 1, 2, 1])}


@functools.cache
def started(ensemble: bool = False):
    method = build(**{"model.ensemble": ensemble})
    return method, jax.jit(method.init)(jax.random.key(0), labelled())


@functools.cache
def logits_of(ensemble: bool = False):
    method, _ = started(ensemble)
    return jax.jit(method.logits)


@functools.cache
def donor_file(folder) -> str:
    """The official file of a pre-trained TIP, with running statistics that are not the start's."""
    method, variables = pretrained()
    moved = jax.tree.map(lambda x: x + 1, variables["batch_stats"])
    table = method.layout()
    state = table.save(jax.device_get(table.joined({**variables, "batch_stats": moved})))
    path = folder / "tip.safetensors"
    write_state_dict(path, state)
    return str(path)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return donor_file(tmp_path_factory.mktemp("tip"))


def test_what_a_missing_cell_holds_does_not_change_the_logits():
    _, variables = started(True)
    batch, missing = batch_of(), cells(1, 4)
    logits = logits_of(True)(variables, batch["image"], batch["table"], missing)
    other = batch["table"].at[:, 1].set(1).at[:, 4].set(np.nan)
    np.testing.assert_array_equal(
        logits_of(True)(variables, batch["image"], other, missing), logits
    )
    whole = logits_of(True)(variables, batch["image"], batch["table"], cells())
    assert not np.allclose(whole, logits)


def test_no_table_is_a_table_of_which_all_is_missing():
    method, variables = started()
    batch = batch_of()
    nothing = cells(*range(COLUMNS))
    np.testing.assert_allclose(
        method.logits(variables, batch["image"]),
        logits_of()(variables, batch["image"], batch["table"], nothing),
        atol=1e-6,
    )
    np.testing.assert_allclose(
        method.logits(variables, batch["image"], batch["table"]),
        logits_of()(variables, batch["image"], batch["table"], cells()),
        atol=1e-6,
    )


def test_an_ensemble_averages_the_logits_of_three_heads():
    _, variables = started(True)
    batch = batch_of()
    given = (batch["image"], batch["table"], cells(0))
    whole = logits_of(True)(variables, *given)
    total = 0
    for head in ("head", "image_head", "table_head"):
        params = {
            name: jax.tree.map(jnp.zeros_like, part) if "head" in name and name != head else part
            for name, part in variables["params"].items()
        }
        total = total + logits_of(True)({**variables, "params": params}, *given)
    np.testing.assert_allclose(total, whole, atol=1e-5)


def test_linear_probing_trains_the_heads_alone_and_moves_the_statistics():
    method = build(**{"model.finetune": "frozen", "model.ensemble": True})
    _, variables = started(True)
    trainable, fixed = split_trainable(method, variables["params"])
    assert set(trainable) == {"head", "image_head", "table_head"}
    assert set(fixed) == set(PARTS)
    loss, aux = jax.jit(method.loss)(variables, labelled(), {}, 0)
    before, after = (flatten(x) for x in (variables, aux.mutable))
    assert np.isfinite(loss)
    assert after
    assert all(np.any(value != before[path]) for path, value in after.items())


def test_statistics_that_stand_still_do_so():
    method = build(**{"model.moving_statistics": False})
    _, variables = started()
    _, aux = jax.jit(method.loss)(variables, labelled(), {}, 0)
    for path, value in flatten(aux.mutable).items():
        np.testing.assert_array_equal(value, flatten(variables)[path], err_msg=path)


def test_weights_and_statistics_of_pretraining_start_the_classifier(official, tmp_path):
    method, variables = started()
    config = configs.load("tip_classifier:tiny", fields())
    optimizer = Experiment.on_one_device(config).optimizer
    state = state_from_variables(method, optimizer, variables)
    donor = read_donor(official, TIP.build(configs.load("tip:tiny", SIZES))).variables
    state, notes = initialize_from(official, method, state)
    taken = flatten(jax.device_get(state.variables))
    fresh = {path for path in taken if path.startswith("params/head/")}
    assert set(taken) - fresh == {
        path for path in donor if path.split("/")[1] in PARTS or path.startswith("batch_stats/")
    }
    for path in set(taken) - fresh:
        np.testing.assert_array_equal(taken[path], donor[path], err_msg=path)
    assert np.all(taken["batch_stats/encoder/stem_norm/batches"] == 1)
    assert any("not in the weights" in note and "head/kernel" in note for note in notes)
    assert any("projector_imaging" in note for note in notes)


def test_a_run_of_pretraining_starts_the_classifier_and_scores_are_of_tables_too(tmp_path):
    small = {
        "model.base": 2,
        "model.depths": (1, 1),
        "model.table_width": 16,
        "model.table_heads": 2,
        "data.image_size": (16, 16),
        "compute_dtype": "float32",
        "batch_size": 16,
        "steps": 2,
        "data.split": "train[:32]",
        "log.pictures_every_steps": 0,
        "log.tensorboard": False,
        "evaluate.protocols": (),
    }

    def run(name, folder, **changes):
        console = Console(file=io.StringIO())
        known = configs.leaves(configs.load(name))
        own = {k: v for k, v in {**small, **changes}.items() if k in known}
        return train(configs.load(name, own), folder, devices=jax.devices()[:1], console=console)

    changes = {"schedule.warmup_epochs": 0.5}
    run("tip:tiny", tmp_path / "tip", **changes)
    result = run("tip_classifier:tiny", tmp_path / "tuned", init_from=str(tmp_path / "tip"))
    statistics = flatten(jax.device_get(result.state.mutable))
    assert statistics["batch_stats/encoder/stem_norm/batches"] == 4, "two steps each"
    config = configs.from_json((tmp_path / "tuned" / "config.json").read_text())
    config.evaluate.test_split = "test[:40]"
    method = TIPClassifier.build(configs.resolve(config, "cpu"))
    assert method.model.num_classes == 12
    variables = result.state.variables
    partial = classification(method, variables, config)
    config.data.table.missing = "none"
    whole = classification(method, variables, config)
    assert partial["cross_entropy"] != whole["cross_entropy"]
    assert 0 <= whole["top1"] <= 1


@pytest.mark.parametrize("ensemble", [True, False])
def test_the_official_file_gives_back_everything(ensemble, tmp_path):
    method, variables = started(ensemble)
    variables = {
        **variables,
        "batch_stats": jax.tree.map(lambda x: x + 2, variables["batch_stats"]),
    }
    config = configs.load("tip_classifier:tiny", fields(**{"model.ensemble": ensemble}))
    export_variables(method, config, variables, tmp_path / "tuned.safetensors")
    # Of other sizes, which the file tells.
    reader = build(**{"model.ensemble": not ensemble, "model.num_classes": 7, "model.base": 4})
    donor = read_donor(str(tmp_path / "tuned.safetensors"), reader)
    assert donor.method.model == method.model
    assert donor.method.key_prefix == "model."
    for path, value in flatten(variables).items():
        np.testing.assert_array_equal(donor.variables[path], value, err_msg=path)


def test_heads_of_other_classes_are_not_taken_over():
    method, variables = started()
    given = flatten(variables["params"])
    other = build(**{"model.num_classes": 5})
    assert other.adopt("head/kernel", given, method) is None
    assert other.adopt("fusion/norm/scale", given, method) is not None
    assert method.adopt("head/kernel", given, method) is not None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.num_classes": 0}, "no labelled data tell it"),
        ({"model.finetune": "half"}, "known are frozen, trainable"),
    ],
)
def test_what_does_not_fit_together_is_told(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("variant", ["dvm", "dvm_full", "cardiac", "cardiac_full"])
def test_published_variants_build(variant):
    columns = {
        "model.categories": (2, 3),
        "model.continuous": 4,
        "model.num_classes": 286,
    }
    config = configs.load(f"tip_classifier:{variant}", columns)
    method = TIPClassifier.build(config)
    assert bool(method.frozen) != variant.endswith("_full")
    assert config.data.table.corrupt_input
