import argparse
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mim_jax.conversion.files import read_state_dict, write_state_dict

STATE = {
    "weight": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
    "bias": np.arange(3, dtype=np.float32),
    "scalar": np.array(2.5, np.float32),
}


class Unsafe:
    """A class that PyTorch does not know."""


def assert_equal(ours: dict, expected: dict = STATE) -> None:
    assert set(ours) == set(expected)
    for key, value in expected.items():
        assert ours[key].dtype == value.dtype
        np.testing.assert_array_equal(ours[key], value)


def test_safetensors_round_trip_is_exact(tmp_path):
    path = tmp_path / "new folder" / "x.safetensors"
    write_state_dict(path, STATE)
    assert_equal(read_state_dict(path))
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_a_transposed_view_is_written_as_what_it_shows(tmp_path):
    transposed = {"weight": STATE["weight"].T}
    write_state_dict(tmp_path / "x.safetensors", transposed)
    assert_equal(read_state_dict(tmp_path / "x.safetensors"), transposed)


def test_a_safetensors_file_in_bfloat16_is_read(tmp_path):
    half = {"weight": STATE["bias"].astype(ml_dtypes.bfloat16)}
    safetensors.numpy.save_file(half, tmp_path / "x.safetensors")
    ours = read_state_dict(tmp_path / "x.safetensors")["weight"]
    np.testing.assert_array_equal(ours.astype(np.float32), STATE["bias"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_prefixes_of_compiled_and_distributed_models_are_left_out(tmp_path, prefix):
    wrapped = {prefix + key: value for key, value in STATE.items()}
    write_state_dict(tmp_path / "x.safetensors", wrapped)
    assert_equal(read_state_dict(tmp_path / "x.safetensors"))


def test_a_prefix_that_only_some_keys_have_is_part_of_their_names(tmp_path):
    state = {"module.weight": STATE["weight"], "bias": STATE["bias"]}
    write_state_dict(tmp_path / "x.safetensors", state)
    assert_equal(read_state_dict(tmp_path / "x.safetensors"), state)


def test_safetensors_need_no_pytorch(tmp_path):
    code = (
        "import sys, numpy as np\n"
        "from mim_jax.conversion.files import read_state_dict, write_state_dict\n"
        "write_state_dict(sys.argv[1], {'a': np.ones(2, np.float32)})\n"
        "assert read_state_dict(sys.argv[1])['a'].tolist() == [1, 1]\n"
        "print('torch' in sys.modules)\n"
    )
    path = str(tmp_path / "x.safetensors")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_a_missing_pytorch_is_an_error_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pth").write_bytes(b"anything")
    with pytest.raises(ImportError, match=r"pip install 'mim-jax\[torch\]', or use a .safetensors"):
        read_state_dict(tmp_path / "x.pth")
    with pytest.raises(ImportError, match="needs PyTorch"):
        write_state_dict(tmp_path / "y.pth", STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize("name", ["x.npz", "x", "x.PTH.txt"])
def test_an_unknown_kind_of_file_is_an_error_that_lists_the_known(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"unknown kind .* known are \.safetensors, \.pth"):
        read_state_dict(tmp_path / name)
    with pytest.raises(ValueError, match=r"unknown kind .* write \.safetensors or \.pth"):
        write_state_dict(tmp_path / name, STATE)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x"])
def test_a_missing_file_is_an_error_that_names_it(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint file .*{name}"):
        read_state_dict(tmp_path / name)


def test_a_damaged_safetensors_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "x.safetensors"
    write_state_dict(path, STATE)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"x\.safetensors is not a readable safetensors file"):
        read_state_dict(path)


class TestWithPyTorch:
    @pytest.fixture(autouse=True)
    def _torch(self):
        self.torch = pytest.importorskip("torch")

    def tensors(self) -> dict:
        return {key: self.torch.from_numpy(value.copy()) for key, value in STATE.items()}

    def saved(self, tmp_path, content):
        path = tmp_path / "x.pth"
        self.torch.save(content, path)
        return path

    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar"])
    def test_round_trip_is_exact(self, tmp_path, suffix):
        write_state_dict(tmp_path / f"x{suffix}", STATE)
        assert_equal(read_state_dict(tmp_path / f"x{suffix}"))

    def test_a_written_file_is_what_the_official_code_loads(self, tmp_path):
        write_state_dict(tmp_path / "x.pth", STATE)
        content = self.torch.load(tmp_path / "x.pth", weights_only=True)
        assert list(content) == ["model"]
        assert_equal({key: value.numpy() for key, value in content["model"].items()})

    @pytest.mark.parametrize(
        "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}]
    )
    def test_a_state_dict_is_found_bare_or_wrapped(self, tmp_path, wrap):
        assert_equal(read_state_dict(self.saved(tmp_path, wrap(self.tensors()))))

    def test_an_own_run_with_its_arguments_and_optimizer_is_read_for_its_model(self, tmp_path):
        content = {
            "model": self.tensors(),
            "optimizer": {"state": {0: {"step": 3}}, "param_groups": []},
            "epoch": 20,
            "scaler": {"scale": 65536.0},
            "args": argparse.Namespace(batch_size=64, device="cuda", blr=1.5e-4),
        }
        assert_equal(read_state_dict(self.saved(tmp_path, content)))

    def test_parameters_and_half_precision_become_float32_arrays(self, tmp_path):
        torch = self.torch
        content = {
            "parameter": torch.nn.Parameter(torch.ones(2)),
            "half": torch.ones(2, dtype=torch.bfloat16),
            "counter": torch.tensor(3),
        }
        for value in read_state_dict(self.saved(tmp_path, content)).values():
            assert value.dtype == np.float32

    def test_a_damaged_file_is_one_line_that_names_it(self, tmp_path):
        path = self.saved(tmp_path, self.tensors())
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(
            ValueError, match=r"x\.pth is not a readable .*: it is damaged"
        ) as error:
            read_state_dict(path)
        assert "\n" not in str(error.value)

    def test_a_file_with_foreign_objects_is_refused_in_one_line_that_names_them(self, tmp_path):
        path = self.saved(tmp_path, {"model": self.tensors(), "extra": Unsafe()})
        with pytest.raises(ValueError, match=r"holds a .*Unsafe.*state dict alone") as error:
            read_state_dict(path)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, [1, 2], 7])
    def test_a_file_without_a_state_dict_is_an_error(self, tmp_path, content):
        with pytest.raises(ValueError, match="holds no state dict, neither directly nor under"):
            read_state_dict(self.saved(tmp_path, content))
