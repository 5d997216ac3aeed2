"""Is our train step of MAE faster or slower than a well-tuned one in PyTorch? The same run tells.

    python -m benchmarks.versus_torch --size small --batch-size 8

Both train the same model on the same uint8 images, already on the device: flip, normalize, mask,
encoder on visible patches, decoder, loss, backward, AdamW. Before anything is timed, PyTorch gets
our weights through the official layout and must give the same loss for the same noise. Ours also
computes the gradient's norm and guards against non-finite values; PyTorch's step does neither.

PyTorch gets what it offers: fused attention, patches embedded by one matrix product after the
removed ones are dropped, fused AdamW, TF32 and bfloat16 autocast on GPU, as many threads as there
are cores, no transfer to the host in a step, and a process of its own, which waits while ours works
and the other way round. It runs eagerly and under torch.compile, both are timed, and the faster one
counts.
"""

import argparse
import functools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks import measure
from mim_jax import config as configs
from mim_jax.data.on_device import normalize
from mim_jax.methods.mae import MAE
from mim_jax.training.experiment import Experiment

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model.size": "",
        "model.width": 32,
        "model.depth": 2,
        "model.heads": 2,
        "model.patch_size": (8, 8),
        "model.decoder_width": 32,
        "model.decoder_depth": 1,
        "model.decoder_heads": 2,
        "data.image_size": (32, 32),
    },
    "small": {"model.size": "", "model.width": 384, "model.depth": 12, "model.heads": 6},
    "base": {"model.size": "base"},
    "large": {"model.size": "large"},
}
"""Changes to `mae:vit_b16`; "small" is ViT-S/16, "tiny" is for tests."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Largest relative difference between the two losses."""


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `[batch, tokens, width]` to the same shape."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with exact GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `[..., width]` to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `[batch, tokens, width]` to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TorchMAE(nn.Module):
    """MAE from images to loss; parameters have their official names and shapes."""

    pos_embed: torch.Tensor
    decoder_pos_embed: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, method: MAE, config: ml_collections.ConfigDict) -> None:
        super().__init__()
        encoder, decoder = method.model.encoder, method.model.decoder
        width, patches = encoder.width, method.tokens
        height, patch_width = encoder.patch_size
        self.patch_size = (height, patch_width)
        self.grid, self.kept = encoder.grid, method.model.kept
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", torch.zeros(1, 1 + patches, width))
        patch_embed = nn.Conv2d(encoder.channels, width, self.patch_size, self.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": patch_embed})
        blocks = encoder.transformer
        self.blocks = nn.Sequential(*(Block(width, blocks.heads) for _ in range(blocks.depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.register_buffer("decoder_pos_embed", torch.zeros(1, 1 + patches, decoder.width))
        blocks = decoder.transformer
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder.width, blocks.heads) for _ in range(blocks.depth))
        )
        self.decoder_norm = nn.LayerNorm(decoder.width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder.width, decoder.outputs)
        self.register_buffer("mean", torch.tensor(config.data.mean), persistent=False)
        self.register_buffer("std", torch.tensor(config.data.std), persistent=False)

    def forward(
        self, images: torch.Tensor, noise: torch.Tensor, flipped: torch.Tensor
    ) -> torch.Tensor:
        """The loss.

        Args:
            images: uint8 `[batch, height, width, channels]`.
            noise: `[batch, patches]`; the smallest values stay visible.
            flipped: bool `[batch, 1, 1, 1]`, images to mirror.
        """
        images = torch.where(flipped, images.flip(2), images)
        patches = self.patchify((images.float() / 255 - self.mean) / self.std)  # [B, L, values]
        order = noise.argsort(dim=1)
        restore, keep = order.argsort(dim=1), order[:, : self.kept]
        visible = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
        pred = self.decode(self.encode(visible, keep), restore)
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        target = (patches - mean) / (variance + 1e-6).sqrt()
        mask = (restore >= self.kept).float()
        return ((pred.float() - target).square().mean(-1) * mask).sum() / mask.sum()

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """Patches `[batch, patches, values]`, values in the order row, column, channel."""
        (rows, columns), (height, width) = self.grid, self.patch_size
        blocks = images.view(images.shape[0], rows, height, columns, width, -1)
        return blocks.transpose(2, 3).reshape(images.shape[0], rows * columns, -1)

    def encode(self, visible: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Encodes visible patches: `[batch, 1 + kept, width]`."""
        convolution = self.patch_embed["proj"]
        assert isinstance(convolution, nn.Conv2d)
        kernel = convolution.weight.permute(0, 2, 3, 1).flatten(1)
        tokens = F.linear(visible, kernel, convolution.bias) + self.pos_embed[0, 1:][keep]
        cls_token = self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype)
        return self.norm(self.blocks(torch.cat([cls_token, tokens], dim=1)))

    def decode(self, tokens: torch.Tensor, restore: torch.Tensor) -> torch.Tensor:
        """Predicts all patches: `[batch, patches, values]`."""
        tokens = self.decoder_embed(tokens)
        removed = restore.shape[1] - self.kept
        filler = self.mask_token.expand(len(tokens), removed, -1).to(tokens.dtype)
        patches = torch.cat([tokens[:, 1:], filler], dim=1)
        patches = patches.gather(1, restore[..., None].expand(-1, -1, tokens.shape[-1]))
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(tokens)))[:, 1:]


class Comparison:
    """One model in both frameworks, with steps to be timed."""

    def __init__(self, config: ml_collections.ConfigDict, steps: int) -> None:
        """Builds and compiles everything.

        Args:
            config: of MAE.
            steps: train steps in one call of a function in `runs`, with one wait at its end.
        """
        self.experiment = Experiment.on_one_device(config)
        self.config, self.steps = self.experiment.config, steps
        assert isinstance(self.experiment.method, MAE)
        self.method = self.experiment.method
        shapes = self.experiment.batch_shapes()
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("JAX sees a GPU and PyTorch does not; install a CUDA build of it.")
        torch.set_num_threads(measure.usable_cores())
        torch.set_float32_matmul_precision("high")  # TF32, which is JAX's default, too
        images = np.random.default_rng(0).integers(0, 256, shapes["image"].shape, np.uint8)
        self.images = jnp.asarray(images)
        self.torch_images = torch.from_numpy(images).to(self.device)
        self.state = self.experiment.initial_state(shapes)

    @functools.cached_property
    def compiled_step(self) -> jax.stages.Compiled:
        """Our train step."""
        return self.experiment.compiled_step(self.experiment.batch_shapes())

    def torch_model(self) -> TorchMAE:
        """A model with our weights."""
        official = self.method.layout().save(jax.device_get(self.state.params))
        model = TorchMAE(self.method, self.config)
        model.load_state_dict({key: torch.tensor(value) for key, value in official.items()})
        return model.to(self.device)

    def autocast(self) -> torch.autocast:
        """Matrix products in the config's compute type."""
        lower = self.config.compute_dtype != "float32"
        return torch.autocast(self.device, torch.bfloat16, enabled=lower)

    def losses(self) -> tuple[float, float]:
        """Our loss and PyTorch's for the same weights, images and noise, without flips."""
        shape = (len(self.images), self.method.tokens)
        noise = np.random.default_rng(1).random(shape, np.float32)

        def loss(params: Any, images: jax.Array, noise: jax.Array) -> jax.Array:
            images = normalize(images, self.config.data.mean, self.config.data.std)
            output = self.method.reconstruct({"params": params}, images, noise)
            return self.method.reconstruction_loss(images, output)

        ours = float(jax.jit(loss)(self.state.params, self.images, jnp.asarray(noise)))
        flipped = torch.zeros(shape[0], 1, 1, 1, dtype=torch.bool, device=self.device)
        with torch.no_grad(), self.autocast():
            theirs = self.torch_model()(
                self.torch_images, torch.from_numpy(noise).to(self.device), flipped
            )
        return ours, float(theirs)

    def run_jax(self) -> None:
        """Some of our train steps."""
        batch = {"image": self.images}
        for _ in range(self.steps):
            self.state, _ = self.compiled_step(self.state, batch)
        jax.block_until_ready(self.state)

    def torch_run(self, compiled: bool) -> Callable[[], None]:
        """A function that runs as many PyTorch steps, on a model of its own."""
        model = self.torch_model()
        forward = torch.compile(model) if compiled else model
        settings = self.config.optimizer
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=1e-4,
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        rows = len(self.torch_images)

        def run() -> None:
            for _ in range(self.steps):
                noise = torch.rand(rows, self.method.tokens, device=self.device)
                flipped = torch.rand(rows, 1, 1, 1, device=self.device) < 0.5
                with self.autocast():
                    loss = forward(self.torch_images, noise, flipped)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if self.device == "cuda":
                torch.cuda.synchronize()

        return run


class TorchProcess:
    """PyTorch's steps in a process of their own, so that neither disturbs the other's memory."""

    def __init__(self, config: ml_collections.ConfigDict, steps: int) -> None:
        """Starts the process; arguments as for `Comparison`."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, configs.to_json(config), steps)
        context.Process(target=_serve_torch, args=arguments, daemon=True).start()

    def run(self, compiled: bool) -> Callable[[], None]:
        """A function that has the steps run, and returns when they are done."""

        def run() -> None:
            self._connection.send(compiled)
            problem = self._connection.recv()
            if problem:
                raise RuntimeError(problem)

        return run


def _serve_torch(connection: Connection, config: str, steps: int) -> None:
    comparison = Comparison(configs.from_json(config), steps)
    runs: dict[bool, Callable[[], None]] = {}
    while True:
        compiled = connection.recv()
        try:
            if compiled not in runs:
                runs[compiled] = comparison.torch_run(compiled)
            runs[compiled]()
        except Exception as error:  # torch.compile needs a C++ compiler, and raises its own kinds
            connection.send(str(error).splitlines()[0])
        else:
            connection.send("")


def compare(
    config: ml_collections.ConfigDict, rounds: int, steps: int, compiled: bool = True
) -> dict[str, Any]:
    """Checks that both compute the same loss, then times both in turns.

    Args:
        config: of MAE.
        rounds: how often each is timed.
        steps: steps for each reading of the clock.
        compiled: also try torch.compile.

    Raises:
        RuntimeError: if the losses differ.
    """
    comparison = Comparison(config, steps)
    dtype = comparison.config.compute_dtype
    ours, theirs = comparison.losses()
    if not math.isclose(ours, theirs, rel_tol=TOLERANCE[dtype]):
        raise RuntimeError(f"the losses differ, so the models do: {ours} (ours), {theirs} (torch).")
    theirs_alone = TorchProcess(config, steps)
    runs = {"jax": comparison.run_jax, "torch": theirs_alone.run(compiled=False)}
    first_call = {}
    if compiled:
        runs["torch.compile"] = theirs_alone.run(compiled=True)
    for name, run in list(runs.items()):
        started = time.perf_counter()
        try:
            run()
        except RuntimeError as error:
            if name != "torch.compile":
                raise
            first_call[name] = f"failed: {error}"
            del runs[name]
        else:
            first_call[name] = f"{time.perf_counter() - started:.1f} s"
    seconds = {
        name: [value / steps for value in values]
        for name, values in measure.alternate(runs, rounds).items()
    }
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min((name for name in medians if name != "jax"), key=medians.__getitem__)
    flops = comparison.experiment.flops_per_step(comparison.experiment.batch_shapes())
    return {
        "batch_size": comparison.config.batch_size,
        "compute_dtype": dtype,
        "torch": {"version": torch.__version__, "threads": torch.get_num_threads()},
        "loss": {"jax": ours, "torch": theirs},
        "steps_per_reading": steps,
        "first_call": first_call,
        "step_seconds": {name: measure.summary(values) for name, values in seconds.items()},
        "images_per_second": {
            name: comparison.config.batch_size / value for name, value in medians.items()
        },
        "gflop_per_second": {name: flops / value / 1e9 for name, value in medians.items()},
        "faster_torch": best,
        "speed_of_jax_over_torch": medians[best] / medians["jax"],
    }


def config_of(size: str, batch_size: int, dtype: str) -> ml_collections.ConfigDict:
    """The MAE of a size."""
    changes: Mapping[str, Any] = {"batch_size": batch_size, "compute_dtype": dtype}
    return configs.load("mae:vit_b16", {**SIZES[size], **changes})


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compares one size and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=("auto", *TOLERANCE), default="auto")
    parser.add_argument("--rounds", type=int, default=10, help="How often each is timed.")
    parser.add_argument("--steps", type=int, default=1, help="Steps for each reading of the clock.")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="Try torch.compile."
    )
    parser.add_argument("--output", type=Path, help="By default results/versus_torch_SIZE.json.")
    options = parser.parse_args(arguments)
    # Otherwise JAX takes most of a GPU's memory before PyTorch asks for any.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    report = measure.Report("versus_torch", arguments)
    config = config_of(options.size, options.batch_size, options.dtype)
    figures = compare(config, options.rounds, options.steps, options.compile)
    path = options.output or measure.RESULTS / f"versus_torch_{options.size}.json"
    return report.write(path, {"size": options.size, **figures})


if __name__ == "__main__":
    main()
