import jax
import numpy as np
import pytest
from PIL import Image

from mim_jax import config as configs
from mim_jax.conversion.files import write_state_dict
from mim_jax.conversion.official import import_checkpoint
from mim_jax.training.derived import as_text, derive, open_fields
from tests.methods.tiny import tiny_config, tiny_mae, tiny_params

DEVICE = jax.devices()[:1]


def folder_of(path, count=40, size=(60, 40), classes=("a", "b"), mode="L", dtype=np.uint8):
    random = np.random.default_rng(0)
    for i in range(count):
        place = path / classes[i % len(classes)] if classes else path
        place.mkdir(parents=True, exist_ok=True)
        shape = size if mode == "L" else (*size, 3)
        values = random.integers(0, np.iinfo(dtype).max // 4, shape).astype(dtype)
        Image.fromarray(values).save(place / f"{i}.{'tif' if dtype == np.uint16 else 'png'}")
    return path


def adapt(source, **changes):
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    return configs.load("mae:adapt", {"data.source": str(source), **fields})


def derived(source, run, devices=DEVICE, **changes):
    return derive(adapt(source, **changes), run, devices)


def test_nothing_is_left_open(tmp_path):
    config, settings = derived(folder_of(tmp_path / "data"), tmp_path)
    assert not open_fields(config)
    assert len({s.field for s in settings}) == len(settings)
    configs.resolve(config, "cpu")


def test_images_decide_channels_bits_statistics_and_sizes(tmp_path):
    config, _ = derived(folder_of(tmp_path / "grey", dtype=np.uint16), tmp_path)
    data = config.data
    assert (data.channels, data.bits) == (1, 16)
    assert data.mean[0] == pytest.approx(1 / 8, rel=0.02)
    assert data.std[0] == pytest.approx(1 / 4 / 12**0.5, rel=0.02)
    assert config.model.patch_size == (4, 4)
    assert data.image_size == (40, 40)  # the median short side, in whole patches
    colour, _ = derived(folder_of(tmp_path / "rgb", size=(300, 500), mode="RGB"), tmp_path / "x")
    assert (colour.data.channels, colour.data.bits) == (3, 8)
    assert colour.model.patch_size == (16, 16)
    assert colour.data.image_size == (224, 224)


def test_tiny_images_still_have_seven_patches_a_side(tmp_path):
    config, _ = derived(folder_of(tmp_path / "data", size=(9, 12)), tmp_path)
    assert config.model.patch_size == (2, 2)
    assert config.data.image_size == (14, 14)


def test_what_is_set_stays(tmp_path):
    source = folder_of(tmp_path / "data")
    config, settings = derived(
        source,
        tmp_path,
        model__patch_size=(8, 8),
        epochs=3.0,
        model__width=64,
        model__depth=2,
        model__heads=2,
        data__channels=3,
        evaluate__protocols=("knn",),
    )
    assert config.model.patch_size == (8, 8) and config.data.image_size == (56, 56)
    assert (config.epochs, config.model.width, config.data.channels) == (3.0, 64, 3)
    assert config.schedule.warmup_epochs == pytest.approx(0.3)
    assert len(config.data.mean) == 3
    assert "epochs" not in {s.field for s in settings}


def test_labels_decide_whether_there_is_a_probe(tmp_path):
    with_labels, _ = derived(folder_of(tmp_path / "a"), tmp_path)
    assert with_labels.evaluate.protocols == ("knn", "linear")
    assert with_labels.evaluate.test_split == "train[90%:]"
    without, _ = derived(folder_of(tmp_path / "b", classes=()), tmp_path / "x")
    assert without.evaluate.protocols == ()
    folder_of(tmp_path / "c" / "train")
    folder_of(tmp_path / "c" / "test")
    split, _ = derived(tmp_path / "c", tmp_path / "y")
    assert (split.evaluate.train_split, split.evaluate.test_split) == ("train", "test")


def test_the_batch_is_one_that_the_devices_divide_and_small_data_allow(tmp_path):
    source = folder_of(tmp_path / "data", count=100)
    for devices in (1, 4):
        config, _ = derived(source, tmp_path, jax.devices()[:devices])
        assert config.batch_size % devices == 0
        assert config.batch_size <= 100 / 8 + devices


def test_a_run_that_goes_on_keeps_its_settings_though_the_data_have_changed(tmp_path):
    source = folder_of(tmp_path / "data")
    config, settings = derived(source, tmp_path)
    assert settings
    (tmp_path / "config.json").write_text(configs.to_json(config))
    folder_of(source, size=(300, 300), mode="RGB", count=400)
    again, settings = derived(source, tmp_path)
    assert not settings
    assert configs.leaves(again) == configs.leaves(config)


@pytest.mark.parametrize("kind", ["run", "file"])
def test_weights_decide_the_model_and_how_positions_are_spread(tmp_path, kind):
    changes = {"data.image_size": (16, 16)}
    given = tmp_path / "x.safetensors"
    write_state_dict(given, tiny_mae(changes).layout().save(tiny_params()))
    if kind == "run":
        import_checkpoint(tiny_config(changes), given, tmp_path / "run")
        given = tmp_path / "run"
    config, settings = derived(
        folder_of(tmp_path / "data", size=(40, 40)),
        tmp_path / "new",
        init_from=str(given),
        data__image_size=(32, 32),
        model__heads=0 if kind == "run" else 2,
        **({} if kind == "run" else {"model__width": 16, "model__depth": 2}),
    )
    model = config.model
    assert (model.width, model.depth, model.heads) == (16, 2, 2)
    assert (model.patch_size, model.position_grid) == ((4, 4), (4, 4))
    assert (model.decoder_width, model.decoder_depth) == (8, 2)
    assert f"of {given}" in as_text(settings)


def test_no_image_size_is_asked_beyond_that_of_the_weights(tmp_path):
    given = tmp_path / "x.safetensors"
    changes = {"data.image_size": (32, 32)}
    write_state_dict(given, tiny_mae(changes).layout().save(tiny_params()))
    import_checkpoint(tiny_config(changes), given, tmp_path / "run")
    config, _ = derived(
        folder_of(tmp_path / "data", size=(300, 300)), tmp_path, init_from=str(tmp_path / "run")
    )
    assert config.data.image_size == (32, 32)
    assert config.model.position_grid == ()


def test_fine_tuning_takes_its_classes_from_the_data(tmp_path):
    changes = {"data.source": str(folder_of(tmp_path / "data", classes=("a", "b", "c")))}
    config, settings = derive(configs.load("finetune:tiny", changes), tmp_path, DEVICE)
    assert (config.model.num_classes, config.model.labels) == (3, "single")
    evaluate = config.evaluate
    assert (config.data.split, evaluate.train_split) == ("train[:90%]", "train[:90%]")
    assert evaluate.test_split == "train[90%:]"
    splits = {"data.split", "evaluate.train_split", "evaluate.test_split"}
    assert {s.field for s in settings} == {"model.num_classes", "model.labels", *splits}


def test_fine_tuning_uses_the_test_split_of_the_data_where_there_is_one(tmp_path):
    config, _ = derive(configs.load("finetune:tiny"), tmp_path, DEVICE)  # embedded
    assert (config.data.split, config.evaluate.test_split) == ("train", "test")


def test_a_classifier_on_convolutional_stages_takes_its_classes_from_the_data_too(tmp_path):
    source = folder_of(tmp_path / "data", count=40, size=(32, 32))
    fields = {"data.source": str(source), "model.size": "", "model.widths": (4, 6, 8)}
    given = configs.load("finetune:convmae_b16", fields)
    config, settings = derive(given, tmp_path, DEVICE)
    assert (config.model.num_classes, config.model.labels) == (2, "single")
    assert {s.field for s in settings} >= {"model.num_classes", "evaluate.test_split"}
    assert config.data.image_size == (224, 224)


def test_a_config_that_leaves_nothing_open_reads_no_data(tmp_path):
    config = configs.load("mae:tiny", {"data.source": "folder:/nowhere"})
    assert derive(config, tmp_path, DEVICE)[1] == []


def test_a_decoder_without_blocks_may_be_meant():
    config = configs.load("cae:v2_b16")
    assert "model.decoder_depth" not in open_fields(config)
    assert "model.decoder_depth" in open_fields(configs.load("mae:adapt"))


def test_weights_alone_tell_how_positions_are_spread(tmp_path):
    given = tmp_path / "x.safetensors"
    changes = {"data.image_size": (16, 16)}
    write_state_dict(given, tiny_mae(changes).layout().save(tiny_params()))
    other = {"data.image_size": (32, 32), "data.source": "folder:/nowhere"}
    config, settings = derive(tiny_config({**other, "init_from": str(given)}), tmp_path, DEVICE)
    assert config.model.position_grid == (4, 4)
    assert [s.field for s in settings] == ["model.position_grid"]


def test_without_data_the_message_says_how_to_give_them(tmp_path):
    with pytest.raises(ValueError, match="give a folder with --data"):
        derive(configs.load("mae:adapt"), tmp_path, DEVICE)


def test_settings_are_shown_as_flags_that_would_set_them(tmp_path):
    settings = derived(folder_of(tmp_path / "data"), tmp_path)[1]
    text = as_text(settings)
    assert '--config.model.patch_size="(4, 4)"' in text
    assert len(text.splitlines()) == len(settings)
