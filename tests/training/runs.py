"""Tiny runs of MAE for tests of the loop, and an eye on the compiler."""

import contextlib
import io
import json

import jax
from rich.console import Console

from mim_jax import config as configs
from mim_jax.training.loop import train

TINY = {
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.decoder_width": 8,
    "model.decoder_heads": 2,
    "model.patch_size": (7, 7),
    "data.split": "train[:160]",
    "batch_size": 32,
    "steps": 6,
    "schedule.warmup_epochs": 0.5,
    "evaluate.protocols": (),
    "evaluate.train_split": "train[:100]",
    "evaluate.test_split": "test[:50]",
    "log.every_steps": 1,
    "log.pictures_every_steps": 0,
    "log.tensorboard": False,
    "checkpoint.every_steps": 3,
}


COMPILATION = "/jax/core/compile/jaxpr_to_mlir_module_duration"
"""What comes before every compilation, and before every look into the compilation cache."""


def tiny(**changes):
    return configs.load("mae:tiny", {**TINY, **changes})


def metrics_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    merged = {}
    for line in lines:
        merged.setdefault(line["step"], {}).update(line)
    return merged


def losses_of(folder):
    return {step: line["loss"] for step, line in metrics_of(folder).items()}


def run(folder, devices=1, on_step=None, **changes):
    """Trains, and returns the result with what was printed."""
    output = io.StringIO()
    result = train(
        tiny(**changes),
        folder,
        devices=jax.devices()[:devices],
        console=Console(file=output, width=200),
        on_step=on_step,
    )
    return result, output.getvalue()


@contextlib.contextmanager
def compilations(steps):
    """The step after which each compilation began, as a list that grows.

    Args:
        steps: a list of one number, the steps taken so far.
    """
    seen = []

    def on_event(name, seconds, **_):
        if name == COMPILATION:
            seen.append(steps[0])

    jax.monitoring.register_event_duration_secs_listener(on_event)
    try:
        yield seen
    finally:
        # The public API can only add listeners.
        from jax._src import monitoring

        monitoring.unregister_event_duration_listener(on_event)
