import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mim_jax.conversion.dvae import dvae_layout, read_dvae
from mim_jax.conversion.files import write_state_dict
from mim_jax.models.dvae import DVAEEncoder
from mim_jax.training.tree import flatten

TINY = DVAEEncoder(hidden=8, blocks_per_group=1, vocabulary=5, channels=1)


def params() -> dict:
    return jax.device_get(TINY.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))["params"]


def test_a_file_with_the_official_keys_gives_back_the_parameters(tmp_path):
    given = params()
    state = dvae_layout(TINY).save(given)
    assert "blocks.group_2.block_1.id_path.w" in state
    assert "blocks.group_1.block_1.id_path.w" not in state
    write_state_dict(tmp_path / "encoder.safetensors", state)
    again = dvae_layout(TINY).load(read_dvae(tmp_path / "encoder.safetensors"), given)
    for path, value in flatten(given).items():
        np.testing.assert_array_equal(flatten(again)[path], value)


def pickled_module(path, state: dict[str, np.ndarray], **attributes) -> None:
    """Writes what OpenAI released: a module of a package that the reader does not have."""
    torch = pytest.importorskip("torch")
    package = types.ModuleType("dall_e_encoder")
    sys.modules["dall_e_encoder"] = package

    class Part(torch.nn.Module):
        pass

    Part.__module__, Part.__qualname__ = "dall_e_encoder", "Part"
    package.Part = Part
    whole = Part()
    for key, value in state.items():
        *parents, name = key.split(".")
        part = whole
        for parent in parents:
            if parent not in part._modules:
                part.add_module(parent, Part())
            part = part._modules[parent]
        part.register_parameter(name, torch.nn.Parameter(torch.from_numpy(value.copy())))
    for name, value in attributes.items():
        setattr(whole, name, value)
    torch.save(whole, path)
    del sys.modules["dall_e_encoder"]


def test_the_released_pickle_is_read_without_its_package(tmp_path):
    state = dvae_layout(TINY).save(params())
    pickled_module(tmp_path / "encoder.pkl", state)
    again = read_dvae(tmp_path / "encoder.pkl")
    assert set(again) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(again[key], value)


class Trap:
    def __init__(self, folder) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_no_code_of_a_pickle_runs(tmp_path):
    state = dvae_layout(TINY).save(params())
    pickled_module(tmp_path / "encoder.pkl", state, trap=Trap(tmp_path / "sprung"))
    assert set(read_dvae(tmp_path / "encoder.pkl")) == set(state)
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_of_something_else_is_an_error_with_its_name(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "encoder.pkl").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=r"encoder\.pkl is no pickled module"):
        read_dvae(tmp_path / "encoder.pkl")
    pickled_module(tmp_path / "empty.pkl", {})
    with pytest.raises(ValueError, match="holds no parameters"):
        read_dvae(tmp_path / "empty.pkl")
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint file .*absent\.pkl"):
        read_dvae(tmp_path / "absent.pkl")
