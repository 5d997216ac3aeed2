import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import alignment_step
from benchmarks.alignment_step import ALIGNED, BASELINE, CONFIGS, CONTROL, SIZES, sized
from mim_jax import config as configs
from mim_jax.method import method_class


@pytest.mark.parametrize("size", SIZES)
def test_all_methods_have_the_same_encoder_and_a_teacher_of_its_size(size):
    wanted = SIZES[size]
    for name in CONFIGS:
        config = configs.resolve(sized(name, wanted, 4), "cpu")
        method = method_class(config.method).build(config)
        encoder = method.encoder
        blocks = encoder.transformer
        found = (encoder.width, blocks.depth, blocks.heads, *encoder.image_size[:1])
        assert (*found, encoder.patch_size[0]) == tuple(wanted), name
        for part in method.pretrained:
            if part.target == "teacher" and hasattr(part.module, "mean"):
                assert part.module.encoder.width == wanted.width, name
                assert part.module.encoder.grid == encoder.grid, name


def test_the_base_size_leaves_published_configs_as_they_are():
    for name in CONFIGS:
        published = configs.leaves(configs.load(name))
        ours = configs.leaves(sized(name, SIZES["base"], published["batch_size"]))
        changed = {field for field in ours if ours[field] != published[field]}
        assert changed <= {f"model.{x}" for x in ("size", "width", "depth", "heads")}, name


def test_main_times_every_step_and_the_targets_and_compares_with_the_control(tmp_path):
    path = tmp_path / "result.json"
    arguments = ["--size", "tiny", "--batch-size", "8", "--rounds", "3", "--output", str(path)]
    alignment_step.main([*arguments, "--configs", ALIGNED])
    result = json.loads(path.read_text())
    assert result["compilations_while_timed"] == 0
    methods = result["methods"]
    assert set(methods) == {ALIGNED, CONTROL}
    assert methods[ALIGNED][f"over_{ALIGNED}"]["median"] == 1
    for name in (ALIGNED, CONTROL):
        assert methods[name]["step_seconds"]["count"] == 3
        assert methods[name]["target_share"]["median"] > 0
        assert methods[name]["parameters"]["fixed"] > 0
    assert result["maskalign_over_its_control"]["count"] == 3


def test_mae_has_no_targets_worth_timing():
    config = configs.resolve(sized(BASELINE, SIZES["tiny"], 4), "cpu")
    method = method_class(config.method).build(config)
    assert alignment_step.targets_of(method, {}, {"image": jnp.zeros((4, 32, 32, 3))}, {}) is None


def test_what_is_compiled_is_noticed():
    with alignment_step.compilations() as compiled:
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
    assert compiled
    count = len(compiled)
    jax.jit(lambda x: x * 5 + 1)(jnp.ones(7)).block_until_ready()
    assert len(compiled) == count


def test_no_rounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        alignment_step.main(["--rounds", "0"])
    assert "--rounds is less than 1" in capsys.readouterr().err
