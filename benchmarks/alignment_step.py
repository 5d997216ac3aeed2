"""How long is a step of each method that learns from a teacher, beside MAE's on the same encoder?

    python -m benchmarks.alignment_step --size small --batch-size 64
    python -m benchmarks.alignment_step --size base --batch-size 128    # on an accelerator

All steps are timed in turns in one process: each is the one that `mim-jax train` compiles, on
random images that stay on the device. In the same turns what makes a method's targets is timed
alone: a frozen teacher or tokenizer, whose weights are random here, which does not change its
speed, or HOG. It gives the share of the step that the teacher takes. MaskAlign is compared with its
control as well, which predicts the same features where patches are hidden, see
`benchmarks.controls`.

Encoders have the same width, depth, heads, patches and images; decoders, regressors and teachers
are scaled as the encoder is to ViT-B/16. A step that compiled anything while it was timed is an
error.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from benchmarks import measure
from benchmarks.controls import FeatureReconstruction
from benchmarks.train_step import synthetic_batch
from mim_jax import config as configs
from mim_jax.method import Batch, Method, Variables
from mim_jax.methods.cae import CAE
from mim_jax.methods.dmjd import DMJD
from mim_jax.methods.locality_alignment import LocalityAlignment
from mim_jax.methods.maskalign import MaskAlign
from mim_jax.methods.mr_mae import MRMAE
from mim_jax.training import sharding
from mim_jax.training.experiment import Experiment
from mim_jax.training.state import split_trainable
from mim_jax.training.step import stream_keys

BASELINE, ALIGNED = "mae:vit_b16", "maskalign:vit_b16"

CONTROL = "maskalign:vit_b16, control"

CONFIGS = (
    BASELINE,
    ALIGNED,
    "mr_mae:vit_b16",
    "dmjd:vit_b16",
    "cae:vit_b16",
    "cae:v2_b16",
    "locality_alignment:clip_b16",
)
"""The methods on a plain ViT; CAE with its tokenizer and, as CAE v2, with CLIP."""


class Size(NamedTuple):
    """Sizes that all encoders have."""

    width: int
    depth: int
    heads: int
    image: int
    patch: int


SIZES = {
    "tiny": Size(48, 2, 3, 32, 8),
    "small": Size(192, 6, 3, 96, 16),
    "base": Size(768, 12, 12, 224, 16),
}
"""For tests, for CPUs, and ViT-B/16."""


def sized(name: str, size: Size, batch_size: int) -> ml_collections.ConfigDict:
    """A named config for ViT-B/16 with an encoder of another size, and all else in proportion.

    Only fields that the config has are changed; the others are as published.
    """
    config = configs.load(name)
    old, model = configs.leaves(config), config.model
    base = SIZES["base"]
    grid = size.image // size.patch
    wider, deeper = size.width / base.width, size.depth / base.depth
    tokens = grid**2 / (base.image // base.patch) ** 2
    encoder = {"width": size.width, "depth": size.depth, "heads": size.heads}
    patch, image = (size.patch,) * 2, (size.image,) * 2
    new: dict[str, Any] = {
        "batch_size": batch_size,
        "data.image_size": image,
        "model.size": "",
        "model.patch_size": patch,
        "model.teacher.patch_size": patch,
        "model.teacher.image_size": image,
        **{f"model.{key}": value for key, value in encoder.items()},
        **{f"model.teacher.{key}": value for key, value in encoder.items()},
    }
    for factor, fields in (
        (wider, ("decoder_width", "decoder_heads", "tokenizer.hidden")),
        (deeper, ("decoder_depth", "regressor_depth")),
        (tokens, ("masked", "min_block")),
    ):
        for field in (f"model.{field}" for field in fields):
            # 0 has a meaning of its own.
            new[field] = max(round(old.get(field, 0) * factor), 1) if old.get(field) else 0
    if "loss_weights" in model:
        new["model.loss_weights"] = f"top{max(round(5 * deeper), 1)}"
    if config.data.target_size:  # 8 x 8 pixels for each patch, as the tokenizer wants them
        new["data.target_size"] = (8 * grid,) * 2
    return configs.load(name, {key: value for key, value in new.items() if key in old})


def targets_of(
    method: Method, variables: Variables, batch: Batch, rngs: dict[str, jax.Array]
) -> Any:
    """What a step of a method computes of its targets, arrays; None if that is next to nothing."""
    images = batch["image"]
    if isinstance(method, FeatureReconstruction):
        return targets_of(method.aligned, variables, batch, rngs)
    if isinstance(method, MaskAlign):
        seen = method.seen(variables, images)
        return [seen.blocks[i] for i in method.model.alignment.aligned], seen.class_attention
    if isinstance(method, MRMAE):
        seen_by_teacher = method.seen(variables, images)
        return None if seen_by_teacher is None else method.mimic_target(seen_by_teacher)
    if isinstance(method, DMJD):
        return method.target(variables, images)
    if isinstance(method, CAE):
        return method.targets(variables, batch, *method.choose(rngs["mask"], len(images)))
    if isinstance(method, LocalityAlignment):
        return method.unscaled_target(variables, images, method.masks(rngs["mask"], len(images)))
    return None


class Timed:
    """A method whose step, and whose targets alone, can be run again and again."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        change: Callable[[Method], Method] | None = None,
        repeat: int = 1,
    ) -> None:
        """Compiles everything.

        Args:
            config: what is trained.
            change: from the config's method to the one that is timed.
            repeat: steps in a run, between which the host does not wait.
        """
        experiment = Experiment.without_data(config)
        if change is not None:
            experiment = dataclasses.replace(experiment, method=change(experiment.method))
        self.experiment, self.repeat = experiment, repeat
        self.batch = synthetic_batch(experiment)
        shapes = experiment.batch_shapes()
        self.state = experiment.initial_state(shapes)
        if experiment.method.calibration_batches:
            self.state = experiment.calibrated(self.state, [jax.device_get(self.batch)])
        self.compiled_step = experiment.compiled_step(shapes)
        self.compiled_targets = self._compiled_targets()

    def _compiled_targets(self) -> jax.stages.Compiled | None:
        experiment, method = self.experiment, self.experiment.method

        def run(variables: Variables, batch: Batch, key: jax.Array) -> Any:
            batch = experiment.prepare(batch, stream_keys(key, ("prepare",))["prepare"])
            return targets_of(method, variables, batch, stream_keys(key, method.streams))

        self.key = jax.random.key(0)
        arguments = self.state.variables, self.batch, self.key
        if jax.eval_shape(run, *arguments) is None:
            return None
        where = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
        rows = sharding.batch_sharding(experiment.mesh)
        return jax.jit(run, in_shardings=(where, rows, None)).lower(*arguments).compile()

    def step(self) -> None:
        """Runs `repeat` steps, and waits for them."""
        for _ in range(self.repeat):
            self.state, _ = self.compiled_step(self.state, self.batch)
        jax.block_until_ready(self.state)

    def targets(self) -> None:
        """Makes the targets of `repeat` steps, and waits for them."""
        assert self.compiled_targets is not None
        for _ in range(self.repeat):
            made = self.compiled_targets(self.state.variables, self.batch, self.key)
        jax.block_until_ready(made)

    def parameters(self) -> dict[str, int]:
        """Number of trained and of fixed parameters."""
        trained, fixed = split_trainable(self.experiment.method, self.state.params)
        parts = {"trained": trained, "fixed": fixed}
        return {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in parts.items()}


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that gets an entry for everything that is compiled inside the context."""
    found: list[str] = []
    inside = True

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if inside and event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        inside = False


def measure_all(
    names: Sequence[str], size: Size, batch_size: int, rounds: int, repeat: int = 1
) -> dict[str, Any]:
    """Times the steps of some configs in turns, and that of MaskAlign's control if it is there.

    Args:
        names: configs; the first one is what the others are compared with.
        size: of all encoders.
        batch_size: images in a step.
        rounds: timed turns.
        repeat: steps in a turn.

    Raises:
        RuntimeError: if anything was compiled while the steps were timed.
    """
    arms = {name: Timed(sized(name, size, batch_size), repeat=repeat) for name in names}
    if ALIGNED in arms:
        config = sized(ALIGNED, size, batch_size)
        arms[CONTROL] = Timed(config, _control, repeat)
    runs: dict[str, Callable[[], Any]] = {}
    for name, arm in arms.items():
        runs[name] = arm.step
        if arm.compiled_targets is not None:
            runs[f"{name}, targets"] = arm.targets
    measure.alternate(runs, rounds=0, warmup=2)
    with compilations() as compiled:
        total = measure.alternate(runs, rounds, warmup=0)
    if compiled:
        raise RuntimeError(f"{len(compiled)} functions were compiled while steps were timed.")
    seconds = {name: [x / repeat for x in values] for name, values in total.items()}

    def ratio(name: str, other: str) -> dict[str, Any]:
        """Of what was timed in the same turn."""
        return measure.summary([a / b for a, b in zip(seconds[name], seconds[other])])

    rows = {}
    for name, arm in arms.items():
        row = {
            "parameters": arm.parameters(),
            "step_seconds": measure.summary(seconds[name]),
            f"over_{names[0]}": ratio(name, names[0]),
        }
        if arm.compiled_targets is not None:
            row["target_seconds"] = measure.summary(seconds[f"{name}, targets"])
            row["target_share"] = ratio(f"{name}, targets", name)
        rows[name] = row
    figures: dict[str, Any] = {
        "encoder": size._asdict(),
        "batch_size": batch_size,
        "compute_dtype": arms[names[0]].experiment.config.compute_dtype,
        "teachers": "random weights",
        "steps_in_a_turn": repeat,
        "compilations_while_timed": len(compiled),
        "methods": rows,
    }
    if CONTROL in arms:
        figures["maskalign_over_its_control"] = ratio(ALIGNED, CONTROL)
    return figures


def _control(method: Method) -> Method:
    assert isinstance(method, MaskAlign)
    return FeatureReconstruction.of(method)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15, help="Timed turns.")
    parser.add_argument("--repeat", type=int, default=1, help="Steps in a turn.")
    parser.add_argument(
        "--configs", nargs="+", default=list(CONFIGS), help="The first is what others are held to."
    )
    parser.add_argument("--output", type=Path, help="By default results/alignment_step_SIZE.json.")
    options = parser.parse_args(arguments)
    for field in ("batch_size", "rounds", "repeat"):
        if getattr(options, field) < 1:
            parser.error(f"--{field.replace('_', '-')} is less than 1")
    report = measure.Report("alignment_step", arguments)
    figures = measure_all(
        options.configs, SIZES[options.size], options.batch_size, options.rounds, options.repeat
    )
    path = options.output or measure.RESULTS / f"alignment_step_{options.size}.json"
    return report.write(path, figures)


if __name__ == "__main__":
    main()
