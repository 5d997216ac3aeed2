import numpy as np
import pytest
from PIL import Image

from mim_jax.evaluation import labelled_data, protocols
from mim_jax.evaluation.protocols import (
    FEATURE_PROTOCOLS,
    NETWORK_PROTOCOLS,
    OTHER_LABELS,
    PROTOCOLS,
    check_protocols,
    compare_with_baselines,
    evaluate,
)
from tests.evaluation.toy import Toy, ToyClassifier, toy_config, toy_variables


@pytest.fixture
def counted_extractions(monkeypatch):
    calls = []
    extract = protocols.extract_features

    def counted(*args, **kwargs):
        calls.append(args)
        return extract(*args, **kwargs)

    monkeypatch.setattr(protocols, "extract_features", counted)
    return calls


@pytest.fixture
def quick_probe(monkeypatch):
    """The paper's 90 epochs are for ImageNet; here only the way to the recipe is of interest."""
    recipe = NETWORK_PROTOCOLS["linear_lars"]
    monkeypatch.setitem(
        NETWORK_PROTOCOLS,
        "linear_lars",
        lambda *args: recipe(*args, batch_size=100, epochs=1.0),
    )


def test_every_protocol_is_described_and_has_one_place():
    assert set(PROTOCOLS) == set(FEATURE_PROTOCOLS) | set(NETWORK_PROTOCOLS)
    assert set(FEATURE_PROTOCOLS).isdisjoint(NETWORK_PROTOCOLS)


def test_all_protocols_give_accuracies_in_the_order_asked(quick_probe, counted_extractions):
    asked = ("linear_lars", "knn", "linear")
    accuracies = evaluate(Toy(), toy_variables(), toy_config(), asked)
    assert tuple(accuracies) == asked
    assert all(0 <= value <= 1 for value in accuracies.values())
    assert accuracies["knn"] > 0.3 and accuracies["linear"] > 0.3  # chance is 0.1
    assert len(counted_extractions) == 2  # one for each split, shared by both protocols


def test_without_names_the_configs_protocols_are_taken():
    config = toy_config(**{"evaluate.protocols": ("knn",)})
    assert set(evaluate(Toy(), toy_variables(), config)) == {"knn"}
    assert evaluate(Toy(), toy_variables(), toy_config(**{"evaluate.protocols": ()})) == {}


def test_baselines_are_the_untrained_encoder_and_raw_pixels(quick_probe):
    trained, untrained = toy_variables(0), toy_variables(1)
    config = toy_config()
    names = ("knn", "linear_lars")
    rows = compare_with_baselines(Toy(), trained, config, names, untrained_variables=untrained)
    assert list(rows) == ["trained", "untrained", "raw pixels"]
    for row, variables in (("trained", trained), ("untrained", untrained)):
        assert set(rows[row]) == set(names)
        assert rows[row]["knn"] == evaluate(Toy(), variables, config, ["knn"])["knn"]
    assert set(rows["raw pixels"]) == {"knn"} and rows["raw pixels"]["knn"] > 0.5


def test_large_images_are_shrunk_for_the_raw_pixel_row():
    config = toy_config(**{"data.image_size": (64, 48), "evaluate.batch_size": 10})
    batch = next(labelled_data.centre_crops(config, "test[:10]", largest_side=32))
    assert batch["image"].shape == (10, 32, 24, 1)
    assert next(labelled_data.centre_crops(config, "test[:10]"))["image"].shape == (10, 64, 48, 1)


def test_unknown_protocol_is_named_with_the_nearest():
    message = "unknown evaluation protocol 'liner'; known are knn, .*Did you mean 'linear'"
    with pytest.raises(ValueError, match=message):
        evaluate(Toy(), toy_variables(), toy_config(), ["knn", "liner"])
    assert check_protocols("knn") == ("knn",)
    assert check_protocols(["knn", "linear", "knn"]) == ("knn", "linear")


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name not in OTHER_LABELS])
def test_data_without_labels_are_named(tmp_path, name):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(255, size=(28, 28), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    config = toy_config(
        **{
            "evaluate.source": f"folder:{tmp_path}",
            "evaluate.train_split": "train",
            "evaluate.test_split": "train",
        }
    )
    with pytest.raises(ValueError, match=f"{tmp_path}.*has no labels"):
        evaluate(ToyClassifier(), toy_variables(), config, [name])


def test_several_scores_of_a_protocol_have_names_of_their_own():
    asked = ("classification", "knn")
    scores = evaluate(ToyClassifier(), toy_variables(), toy_config(), asked)
    assert list(scores) == [
        "classification/top1",
        "classification/top5",
        "classification/auroc",
        "classification/cross_entropy",
        "knn",
    ]
    assert scores["knn"] == evaluate(Toy(), toy_variables(), toy_config(), ["knn"])["knn"]


def test_a_protocol_that_the_method_cannot_do_is_refused_before_any_work(counted_extractions):
    message = "'classification' needs a classifier.*Toy gives features only"
    with pytest.raises(ValueError, match=message):
        evaluate(Toy(), toy_variables(), toy_config(), ["knn", "classification"])
    assert not counted_extractions
    with pytest.raises(ValueError, match=message):
        check_protocols(["classification"], Toy())
    assert check_protocols(["classification"], ToyClassifier()) == ("classification",)


def test_examples_without_label_in_a_labelled_source_are_named(monkeypatch):
    """Some public test splits carry the label -1 throughout."""
    source, classes = labelled_data.labelled_source(toy_config(), "test[:20]")
    source.labels = np.full(20, -1)
    monkeypatch.setattr(labelled_data, "labelled_source", lambda *_: (source, classes))
    with pytest.raises(ValueError, match=r"embedded:test\[:20\].*has no labels"):
        list(labelled_data.centre_crops(toy_config(), "test[:20]"))


def test_source_of_the_evaluation_may_differ_from_that_of_the_training():
    config = toy_config(**{"data.source": "folder:/nowhere", "evaluate.source": "embedded"})
    source, classes = labelled_data.labelled_source(config, "test")
    assert (len(source), classes) == (1000, 10)
