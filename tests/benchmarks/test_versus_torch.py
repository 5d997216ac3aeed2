import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the comparison needs PyTorch")

from benchmarks import versus_torch  # noqa: E402


def test_main_compares_equal_models_and_writes_the_ratio(tmp_path):
    path = tmp_path / "result.json"
    arguments = ["--size", "tiny", "--batch-size", "4", "--rounds", "2", "--no-compile"]
    versus_torch.main([*arguments, "--output", str(path)])
    result = json.loads(path.read_text())
    assert result["loss"]["jax"] == pytest.approx(result["loss"]["torch"], rel=1e-4)
    medians = {name: entry["median"] for name, entry in result["step_seconds"].items()}
    assert set(medians) == {"jax", "torch"} and result["faster_torch"] == "torch"
    assert result["speed_of_jax_over_torch"] == pytest.approx(medians["torch"] / medians["jax"])
    assert result["images_per_second"]["jax"] == pytest.approx(4 / medians["jax"])


def test_a_model_that_differs_is_never_timed(monkeypatch):
    monkeypatch.setattr(versus_torch.Comparison, "losses", lambda self: (1.0, 1.001))
    config = versus_torch.config_of("tiny", 2, "float32")
    with pytest.raises(RuntimeError, match="the losses differ"):
        versus_torch.compare(config, rounds=1, steps=1, compiled=False)


def test_torch_gradients_equal_ours():
    comparison = versus_torch.Comparison(versus_torch.config_of("tiny", 4, "float32"), steps=1)
    method, model = comparison.method, comparison.torch_model()
    noise = np.random.default_rng(0).random((4, method.tokens), np.float32)
    images = np.array(comparison.images)
    model(
        torch.from_numpy(images), torch.from_numpy(noise), torch.zeros(4, 1, 1, 1).bool()
    ).backward()
    data = comparison.config.data
    normalized = (images / np.float32(255) - np.float32(data.mean)) / np.float32(data.std)

    def loss(params):
        return method.reconstruction_loss(
            normalized, method.reconstruct({"params": params}, normalized, noise)
        )

    ours = method.layout().save(jax.device_get(jax.jit(jax.grad(loss))(comparison.state.params)))
    for name, parameter in model.named_parameters():
        theirs = parameter.grad.numpy()
        error = np.abs(ours[name] - theirs).max()
        assert error <= 1e-4 * np.abs(theirs).max() + 1e-7, name
