"""Is aligning visible tokens with a teacher as good as reconstructing its features, and faster?

    python -m benchmarks.experiments.maskalign

Fashion-MNIST; the teacher is a small ViT that was told six groups of the ten classes on other
images. Students of its shape, equal numbers of steps:

 * MaskAlign (masks by the teacher's attention, linear fusion, the last two layers);
 * the control: an MAE encoder whose decoder predicts the same features at hidden patches;
 * MAE on pixels;
 * ablations: fusion "simple", random masks, mask ratios of 50 % and 90 %.

Claim: MaskAlign is at least level with the control at a clearly shorter step; both are above MAE.
Result: benchmarks/results/maskalign.json.
"""

import sys
from typing import Any

import numpy as np

from benchmarks.controls import FeatureReconstruction
from benchmarks.experiments import toy_images, toy_task
from benchmarks.experiments.toy_images import Images
from benchmarks.experiments.toy_task import Arm, Scores, Trained, Workbench
from mim_jax.method import Method
from mim_jax.methods.maskalign import MaskAlign

LR = 2e-3
FINETUNE_STEPS = 200

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
    donor = (trained.method, trained.variables)
    accuracy = toy_task.finetuned_accuracy(donor, trained.task, trained.seed, FINETUNE_STEPS)
    few = len(trained.task.few.images)
    return {**toy_task.encoder_scores(trained), f"fine-tuned, {few} labels": accuracy}


def add_baselines(bench: Workbench, supervised_steps: int) -> None:
    """Rows that no pre-training takes part in: all labels, pixels, no training."""
    task = bench.task
    bench.add(
        "trained with all labels",
        ["supervised", supervised_steps],
        lambda seed: {"test": toy_task.supervised_accuracy(task, seed, supervised_steps)},
        once=True,
    )
    bench.add("none: raw pixels", ["raw"], lambda seed: toy_task.pixel_scores(task), once=True)
    bench.add_arm("untrained", Arm("mae:tiny", MAE_ARM, 0), scores_of, f"{FINETUNE_STEPS}")


def add_teacher(bench: Workbench, steps: int) -> tuple[str, Scores]:
    """The row of the teacher, fine-tuned as the students are; its file, and what it is."""
    task, few = bench.task, len(bench.task.few.images)
    path, teacher, variables = bench.teacher(steps)

    def features(images: Images) -> np.ndarray:
        return toy_task.tokens_of(teacher, variables, images).mean(axis=1)

    def scores(seed: int) -> Scores:
        donor = (teacher, variables)
        accuracy = toy_task.finetuned_accuracy(donor, task, seed, FINETUNE_STEPS)
        return {**toy_task.probe_scores(features, task), f"fine-tuned, {few} labels": accuracy}

    bench.add("the teacher", ["teacher", steps, FINETUNE_STEPS], scores)
    logits = toy_task.predictions(teacher, variables, task.test)
    own = float(np.mean(logits.argmax(axis=1) == toy_images.GROUPS[task.test.labels]))
    return path, {"steps": steps, "accuracy on its own groups": own}


def main(arguments: list[str] | None = None) -> int:
    """Runs everything and writes the result."""
    options = toy_task.arguments("maskalign", __doc__, 600, arguments)
    task, steps = toy_images.fashion(options.full), options.steps
    bench = Workbench("maskalign", task, options)
    path, about_teacher = add_teacher(bench, options.teacher_steps)
    print(f"teacher: {about_teacher}", flush=True)
    tag = f"probes, {FINETUNE_STEPS}, teacher {options.teacher_steps}"
    shared = {**bench.tower(path), "optimizer.lr": LR}

    def arm(method: Any = None, **changes: Any) -> Arm:
        fields = {f"model.{name}": value for name, value in changes.items()}
        return Arm("maskalign:tiny", {**shared, **fields}, steps, method)

    add_baselines(bench, options.teacher_steps // 2)
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
            "claim": "MaskAlign >= control > MAE on pixels; its step is shorter than the control's",
            "steps": steps,
            "batch size": task.batch_size,
            "learning rate": LR,
            "fine-tuning steps": FINETUNE_STEPS,
            "teacher": about_teacher,
            "step milliseconds": times,
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
