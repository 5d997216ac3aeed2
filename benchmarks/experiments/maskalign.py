"""Does aligning visible tokens with a teacher do as well as reconstructing its features, and faster?

    python -m benchmarks.experiments.maskalign

Fashion-MNIST; the teacher is a small ViT that was told six groups of the ten classes on other images.
Students of its shape, equal numbers of steps:

 * MaskAlign (masks by the teacher's attention, linear fusion, the last two layers);
 * the control: an MAE encoder whose decoder predicts the same features at hidden patches;
 * MAE on pixels;
 * ablations: fusion "simple", random masks, mask ratios of 50 % and 90 %.

Claim: MaskAlign is at least level with the control at a clearly shorter step, and both are above MAE.
Result: benchmarks/results/maskalign.json.
"""

import sys
from typing import Any

import numpy as np

from benchmarks.controls import FeatureReconstruction
from benchmarks.experiments import toy_task
from benchmarks.experiments.toy_task import Arm, Images, Scores, Trained, Workbench
from mim_jax.method import Method
from mim_jax.methods.maskalign import MaskAlign

LR = 2e-3
FINETUNE_STEPS = 150

MAE_ARM = {
    "model.decoder_width": 32,
    "model.decoder_depth": 2,
    "model.decoder_heads": 4,
    "model.mask_ratio": 0.7,
    "optimizer.lr": LR,
}
"""Ratio and decoder as those of the control."""


def control(method: Method) -> Method:
    """The reconstruction control of a MaskAlign, with a decoder of 2 blocks of half the width."""
    assert isinstance(method, MaskAlign)
    return FeatureReconstruction.of(method, depth=2)


def scores_of(trained: Trained) -> Scores:
    """Probes, and fine-tuning with few labels."""
    accuracy = toy_task.finetuned_accuracy(trained, trained.task, trained.seed, FINETUNE_STEPS)
    few = len(trained.task.few.images)
    return {**toy_task.encoder_scores(trained), f"fine-tuned, {few} labels": accuracy}


def add_baselines(bench: Workbench, supervised_steps: int) -> None:
    """Rows that no pre-training takes part in: all labels, no training, pixels."""
    task, few = bench.task, len(bench.task.few.images)
    bench.add(
        "trained with all labels",
        ["supervised", supervised_steps],
        lambda seed: {"test": toy_task.supervised_accuracy(task, seed, supervised_steps)},
    )
    bench.add("none: raw pixels", ["raw pixels"], lambda seed: toy_task.pixel_scores(task))

    def untrained(seed: int) -> Scores:
        trained = toy_task.Trainer(task, Arm("mae:tiny", MAE_ARM, 0)).train(seed)
        accuracy = toy_task.finetuned_accuracy(None, task, seed, FINETUNE_STEPS)
        return {**toy_task.encoder_scores(trained), f"fine-tuned, {few} labels": accuracy}

    bench.add("untrained", ["untrained", FINETUNE_STEPS], untrained)


def teacher_scores(bench: Workbench, teacher: Method, variables: Any) -> Scores:
    """Accuracy on its own groups, and probes of its patch tokens on the ten classes."""
    task = bench.task
    logits = toy_task.predictions(teacher, variables, task.test)  # type: ignore[arg-type]
    own = float(np.mean(logits.argmax(axis=1) == toy_task.GROUPS[task.test.labels]))

    def features(images: Images) -> np.ndarray:
        return toy_task.tokens_of(teacher, variables, images).mean(axis=1)

    return {"its own groups": own, **toy_task.probe_scores(features, task)}


def main(arguments: list[str] | None = None) -> int:
    """Runs everything and writes the result."""
    options = toy_task.arguments("maskalign", __doc__, 400, arguments)
    task, steps = toy_task.fashion(options.full), options.steps
    bench = Workbench("maskalign", task, options)
    path, teacher, variables = bench.teacher(options.teacher_steps)
    about_teacher = teacher_scores(bench, teacher, variables)
    print(f"teacher: {about_teacher}", flush=True)
    tag = f"probes, {FINETUNE_STEPS}, teacher {options.teacher_steps}"
    shared = {**bench.tower(path), "optimizer.lr": LR}

    def arm(method: Any = None, **changes: Any) -> Arm:
        fields = {f"model.{name}": value for name, value in changes.items()}
        return Arm("maskalign:tiny", {**shared, **fields}, steps, method)

    add_baselines(bench, options.teacher_steps)
    bench.add_arm("MAE on pixels", Arm("mae:tiny", MAE_ARM, steps), scores_of, tag)
    bench.add_arm("control: features at hidden patches", arm(control), scores_of, f"{tag}, control")
    bench.add_arm("MaskAlign", arm(), scores_of, tag)
    if options.ablations:
        score, tag = toy_task.encoder_scores, f"{tag}, probes alone"
        bench.add_arm("MaskAlign, fusion simple", arm(fusion="simple"), score, tag)
        bench.add_arm("MaskAlign, random masks", arm(mask_type="random"), score, tag)
        bench.add_arm("MaskAlign, ratio 50 %", arm(mask_ratio=0.5), score, tag)
        bench.add_arm("MaskAlign, ratio 90 %", arm(mask_ratio=0.9), score, tag)
    times = toy_task.step_times(
        task,
        {
            "MaskAlign": arm(),
            "control: features at hidden patches": arm(control),
            "MAE on pixels": Arm("mae:tiny", MAE_ARM, steps),
        },
        options.rounds,
    )
    bench.write(
        {
            "claim": "MaskAlign >= control > MAE on pixels, and its step is shorter than the control's",
            "steps": steps,
            "batch size": task.batch_size,
            "learning rate": LR,
            "fine-tuning steps": FINETUNE_STEPS,
            "teacher": {"steps": options.teacher_steps, **about_teacher},
            "step milliseconds": times,
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
