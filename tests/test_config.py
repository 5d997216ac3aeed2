import json
import textwrap

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from mim_jax import config as configs
from mim_jax.method import method_class
from mim_jax.training.derived import derive, open_fields


def all_variants() -> list[str]:
    """`mae:tiny` and every other variant of every config that comes with the package."""
    names = []
    for name in configs.known_configs():
        path, _ = configs.find(name)
        scope: dict = {}
        exec(compile(path.read_text(), str(path), "exec"), scope)
        names += [f"{name}:{variant}" for variant in scope["VARIANTS"]]
    return names


@pytest.fixture
def write_config(tmp_path):
    """Writes a config file, and returns its path."""

    def write(body: str) -> str:
        path = tmp_path / "mine.py"
        start = "from ml_collections import ConfigDict\n"
        path.write_text(start + textwrap.dedent(body))
        return str(path)

    return write


def own(write_config, fields: str) -> str:
    return write_config(
        f"""
        VARIANTS = ("small",)
        def get_config(variant="small"):
            return ConfigDict(dict({fields}))
        """
    )


@pytest.mark.parametrize("name", all_variants())
def test_every_variant_of_every_config_builds_its_method(name, tmp_path):
    config = configs.load(name)
    if opened := open_fields(config):
        if "model.categories" in opened:
            config.data.source = "synthetic:pairs"
        elif "model.domains" in opened:
            config.data.source = "mix:" + "+".join(
                f"1*synthetic:collections:{number}" for number in range(4)
            )
        else:
            config.data.source = "embedded"
        config, _ = derive(config, tmp_path)
    config = configs.resolve(config, "cpu")
    method = method_class(config.method).build(config)
    shape = (2, *config.data.image_size, config.data.channels)
    kinds = {"float": jnp.float32, "int": jnp.int32}
    batch = {
        entry: jax.ShapeDtypeStruct((2, *wanted.shape), kinds[wanted.dtype])
        for entry, wanted in method.inputs.items()
    }
    batch["image"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    method.check(batch)
    variables = jax.eval_shape(lambda: method.init(jax.random.key(0), batch))
    assert jax.tree.leaves(variables["params"])


@pytest.mark.parametrize("name", all_variants())
def test_every_config_survives_json(name):
    config = configs.load(name)
    again = configs.from_json(configs.to_json(config))
    assert configs.leaves(again) == configs.leaves(config)
    assert [type(v) for v in configs.leaves(again).values()] == [
        type(v) for v in configs.leaves(config).values()
    ]


def test_json_has_one_field_a_line_and_may_come_parsed():
    config = configs.load("mae:tiny", {"seed": 7})
    text = configs.to_json(config)
    assert '\n  "seed": 7' in text
    assert configs.leaves(configs.from_json(json.loads(text))) == configs.leaves(config)


def test_nested_rules_survive_json():
    rules = (("attention", ("fsdp", None, "tensor")), (".*", "fsdp:largest"))
    config = configs.load("mae:tiny", {"sharding.rules": rules})
    assert configs.from_json(configs.to_json(config)).sharding.rules == rules


def test_json_of_another_version_names_the_field_that_is_unknown():
    fields = json.loads(configs.to_json(configs.load("mae:tiny")))
    fields["data"]["sauce"] = "embedded"
    with pytest.raises(ValueError, match=r"no field 'data\.sauce'.*'data\.source'"):
        configs.from_json(fields)


def test_json_that_lacks_a_field_gets_the_default():
    fields = json.loads(configs.to_json(configs.load("mae:tiny")))
    del fields["max_nonfinite"]
    assert configs.from_json(fields).max_nonfinite == configs.defaults().max_nonfinite


def test_a_config_changes_only_what_it_lists():
    given, defaults = (
        configs.leaves(configs.load("mae:vit_b16")),
        configs.leaves(configs.defaults()),
    )
    assert set(defaults) - {"model"} <= set(given)
    assert given["batch_size"] == 4096 != defaults["batch_size"]
    assert given["mesh.data"] == defaults["mesh.data"]


def test_a_config_without_variant_takes_the_files_own_default():
    assert configs.leaves(configs.load("mae")) == configs.leaves(configs.load("mae:vit_b16"))
    assert configs.load("mae:tiny").data.source == "embedded"


def test_two_loaded_configs_share_nothing():
    before = configs.load("mae:tiny").model.width
    changed = configs.load("mae:tiny", {"model.width": before + 4})
    assert configs.load("mae:tiny").model.width == before
    assert changed.model.width == before + 4


@pytest.mark.parametrize(
    ("field", "nearest"),
    [
        ("batchsize", "batch_size"),
        ("data.image_sise", "data.image_size"),
        ("optimizer.learning_rate", "optimizer."),
        ("model.widht", "model.width"),
    ],
)
def test_an_unknown_field_is_an_error_that_names_the_nearest(field, nearest):
    with pytest.raises(ValueError) as error:
        configs.load("mae:tiny", {field: 3})
    assert f"no field {field!r}" in str(error.value)
    assert nearest in str(error.value).split("field", 1)[1].replace(repr(field), "")


def test_a_field_like_no_other_is_an_error_that_lists_all():
    with pytest.raises(ValueError, match=r"Known are: .*batch_size.*seed"):
        configs.load("mae:tiny", {"zzzzqqqq": 3})


@pytest.mark.parametrize("field", ["data", "model"])
def test_a_whole_section_cannot_be_replaced_by_a_value(field):
    with pytest.raises(ValueError, match=f"no field {field!r}"):
        configs.load("mae:tiny", {field: "x"})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("batch_size", "64", "int"),
        ("batch_size", 64.0, "int"),
        ("seed", True, "int"),
        ("epochs", "5", "float"),
        ("epochs", True, "float"),
        ("data.flip", 1, "bool"),
        ("data.source", 3, "str"),
        ("data.image_size", 32, "tuple"),
        ("data.image_size", ("wide", "high"), "tuple"),
        ("data.image_size", (28.0, 28.0), "tuple"),
        ("model.width", "96", "int"),
    ],
)
def test_an_ill_typed_value_is_an_error_that_names_both_types(field, value, expected):
    with pytest.raises(ValueError) as error:
        configs.load("mae:tiny", {field: value})
    assert f"{field!r} is {value!r} ({type(value).__name__}); expected {expected}" in str(
        error.value
    )


def test_an_int_serves_for_a_float_and_a_list_for_a_tuple():
    config = configs.load("mae:tiny", {"epochs": 5, "data.image_size": [32, 16]})
    assert config.epochs == 5.0
    assert isinstance(config.epochs, float)
    assert config.data.image_size == (32, 16)
    mean = configs.load("mae:tiny", {"data.mean": [0]}).data.mean
    assert mean == (0.0,)
    assert isinstance(mean[0], float)


def test_a_complete_config_takes_no_new_fields():
    config = configs.load("mae:tiny")
    with pytest.raises(AttributeError):
        config.batchsize = 3
    with pytest.raises(AttributeError):
        config.data.sauce = "x"


def test_an_unknown_config_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown config 'mea'; .*\.py\. Did you mean 'mae'\?"):
        configs.load("mea:tiny")


def test_an_unknown_variant_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match=r"no variant 'vit_b61'; .*Did you mean 'vit_b16'\?"):
        configs.load("mae:vit_b61")


def test_a_missing_config_file_is_an_error():
    with pytest.raises(ValueError, match=r"config file nowhere/mine\.py does not exist"):
        configs.load("nowhere/mine.py:tiny")


def test_a_config_is_found_by_path_with_and_without_variant(write_config):
    path = write_config(
        """
        VARIANTS = ("small", "large")
        def get_config(variant="small"):
            return ConfigDict(dict(method="mae", batch_size=8 if variant == "small" else 64))
        """
    )
    assert configs.load(path).batch_size == 8
    assert configs.load(f"{path}:large").batch_size == 64
    assert configs.load(path, {"batch_size": 2}).batch_size == 2
    with pytest.raises(ValueError, match=r"no variant 'huge'; known are \['small', 'large'\]"):
        configs.load(f"{path}:huge")


def test_an_unknown_field_in_a_config_file_is_an_error(write_config):
    with pytest.raises(ValueError, match=r"no field 'bach_size'.*'batch_size'"):
        configs.load(own(write_config, "method='mae', bach_size=8"))


def test_an_ill_typed_field_in_a_config_file_is_an_error(write_config):
    with pytest.raises(ValueError, match=r"'data\.flip' is 'no' \(str\); expected bool"):
        configs.load(own(write_config, "data=dict(flip='no')"))


@pytest.mark.parametrize(
    ("body", "absent"),
    [
        ("def get_config(variant='a'):\n    return ConfigDict()", "VARIANTS"),
        ("VARIANTS = ('a',)", "get_config"),
        ("", "VARIANTS and no get_config"),
    ],
)
def test_a_file_that_is_no_config_is_an_error_that_says_what_it_lacks(write_config, body, absent):
    with pytest.raises(ValueError, match=f"mine.py defines no {absent}; it needs"):
        configs.load(write_config(body))


def test_free_parts_take_the_fields_that_the_method_or_user_gives(write_config):
    config = configs.load(
        own(
            write_config,
            """
            method="toy",
            model=dict(invented=3, inner=dict(deep=(1, 2))),
            optimizer=dict(groups=dict(head=dict(lr=0.5))),
            sharding=dict(rules=((".*", "fsdp:largest"),)),
            """,
        )
    )
    assert config.model.invented == 3
    assert config.model.inner.deep == (1, 2)
    assert config.optimizer.groups.head.lr == 0.5
    assert config.sharding.rules == ((".*", "fsdp:largest"),)
    assert configs.leaves(configs.from_json(configs.to_json(config))) == configs.leaves(config)


def test_fields_that_a_free_part_already_has_are_still_checked(write_config):
    path = own(write_config, "model=dict(invented=3)")
    with pytest.raises(ValueError, match=r"no field 'model\.inventet'.*'model\.invented'"):
        configs.load(path, {"model.inventet": 4})
    with pytest.raises(ValueError, match=r"'model\.invented' is 'x' \(str\); expected int"):
        configs.load(path, {"model.invented": "x"})


@pytest.mark.parametrize(
    ("platform", "expected"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")]
)
def test_the_compute_type_follows_the_machine_unless_it_is_given(platform, expected):
    config = configs.load("mae:tiny")
    assert configs.resolve(config, platform).compute_dtype == expected
    assert config.compute_dtype == "auto"
    given = configs.load("mae:tiny", {"compute_dtype": "float32"})
    assert configs.resolve(given, platform).compute_dtype == "float32"


def test_an_unknown_compute_type_is_an_error_that_lists_the_known():
    config = configs.load("mae:tiny", {"compute_dtype": "half"})
    with pytest.raises(ValueError, match="compute_dtype is 'half'; known are auto, float32"):
        configs.resolve(config, "cpu")


@pytest.mark.parametrize("field", ["mean", "std"])
def test_statistics_of_another_number_of_channels_are_an_error(field):
    config = configs.load("mae:tiny", {f"data.{field}": (0.5, 0.5, 0.5)})
    with pytest.raises(ValueError, match=rf"data\.{field} is \(0\.5.*data\.channels is 1"):
        configs.resolve(config, "cpu")


def test_leaves_name_every_field_by_its_dots():
    config = ml_collections.ConfigDict(dict(a=1, b=dict(c=2, d=dict(e=(3,)))))
    assert configs.leaves(config) == {"a": 1, "b.c": 2, "b.d.e": (3,)}
