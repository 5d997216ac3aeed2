"""Do pixels for hidden patches and a teacher's features for visible ones go together?

    python -m benchmarks.experiments.mr_mae

Fashion-MNIST; the teacher is a small ViT that was told six groups of the ten classes on other
images. Equal numbers of steps on the same encoder:

 * MAE: pixels of hidden patches; MR-MAE: these, and features of visible ones;
 * features of hidden patches in place of pixels; features of visible patches alone;
 * ConvMAE's hybrid encoder of about as many parameters, with pixels alone, and with the leak that
   its masked convolutions prevent.

Claims: MR-MAE is above MAE and not below features at hidden patches; ConvMAE is not below MAE; with
the leak the pre-training loss falls lower, while the probes get worse.
Result: benchmarks/results/mr_mae.json and a picture of reconstructions.
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks.experiments import toy_images, toy_task
from benchmarks.experiments.maskalign import (
    FINETUNE_STEPS,
    LR,
    add_baselines,
    add_teacher,
    scores_of,
)
from benchmarks.experiments.toy_images import Task
from benchmarks.experiments.toy_task import Arm, Trained, Workbench
from mim_jax import losses
from mim_jax.data.on_device import denormalize, normalize
from mim_jax.method import Aux, Batch, Method, Variables
from mim_jax.methods.mr_mae import MRMAE
from mim_jax.training import tree
from mim_jax.training.pictures import picture_grid

DECODER = {"model.decoder_width": 32, "model.decoder_depth": 2, "model.decoder_heads": 4}

HYBRID = {
    **DECODER,
    "model.widths": (16, 32, toy_task.WIDTH),
    "model.depths": (1, 1, toy_task.DEPTH),
    "model.patch_sizes": (2, 2, 2),
    "model.normalize_target": False,
    "data.crop_area": (0.5, 1.0),
    "optimizer.lr": LR,
}
"""ConvMAE as small as the ViT, with its patches and its training."""


@dataclasses.dataclass(frozen=True)
class FeaturesAtHidden(MRMAE):
    """The decoder predicts the teacher's features of hidden patches, and nobody pixels."""

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Squared error of features over the hidden patches."""
        images = batch["image"]
        seen = self.seen(variables, images)
        assert seen is not None
        chosen = self.choose(rngs["mask"], len(images), seen)
        output = self.predict(variables, images, chosen)
        assert output.pred is not None
        error = losses.squared_error(output.pred, self.mimic_target(seen))
        return losses.masked_mean(error, chosen.mask), Aux()


def features_at_hidden(method: Method) -> Method:
    """The same encoder, decoder and teacher with another target, and no mimic head."""
    assert isinstance(method, MRMAE) and method.teacher is not None
    assert method.model.decoder is not None
    decoder = method.model.decoder.clone(outputs=method.teacher.encoder.width)
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    fields["model"] = method.model.clone(decoder=decoder, mimic_head=None)
    return FeaturesAtHidden(**fields)


def parameters(task: Task, arm: Arm) -> int:
    """Number of parameters of an arm's encoder."""
    state = jax.eval_shape(toy_task.Trainer(task, arm).initial, 0)
    return sum(x.size for x in jax.tree.leaves(tree.subtree(state.params, "encoder")))


def draw(trained: Trained, path: Path) -> None:
    """Reconstructions of some test images."""
    images = normalize(jnp.asarray(trained.task.test.images[:6]), toy_task.MEAN, toy_task.STD)
    keys = {name: jax.random.key(i) for i, name in enumerate(trained.method.streams)}
    picture = trained.method.pictures(trained.variables, {"image": images}, keys)["reconstruction"]
    columns = {
        title: np.asarray(denormalize(column, toy_task.MEAN, toy_task.STD))
        for title, column in picture.columns.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture_grid(columns, picture.caption)).save(path)


def main(arguments: list[str] | None = None) -> int:
    """Runs everything and writes the result."""
    options = toy_task.arguments("mr_mae", __doc__, 600, arguments)
    task, steps = toy_images.fashion(options.full), options.steps
    bench = Workbench("mr_mae", task, options)
    path, about_teacher = add_teacher(bench, options.teacher_steps)
    print(f"teacher: {about_teacher}", flush=True)
    tag = f"probes, {FINETUNE_STEPS}, teacher {options.teacher_steps}"
    shared = {**bench.tower(path), **DECODER, "optimizer.lr": LR}
    picture = options.output.with_suffix(".png")

    def arm(method: Any = None, **changes: Any) -> Arm:
        fields = {f"model.{name}": value for name, value in changes.items()}
        return Arm("mr_mae:tiny", {**shared, **fields}, steps, method)

    def scores_and_picture(trained: Trained) -> toy_task.Scores:
        if trained.seed == options.first_seed:
            draw(trained, picture)
        return scores_of(trained)

    add_baselines(bench, options.teacher_steps // 2)
    bench.add_arm("(i) MAE: pixels at hidden patches", arm(mimic_weight=0.0), scores_of, tag)
    bench.add_arm("(ii) MR-MAE: and features at visible ones", arm(), scores_and_picture, tag)
    hidden = arm(features_at_hidden)
    bench.add_arm("(iii) features at hidden patches", hidden, scores_of, f"{tag}, at hidden")
    mimic = arm(reconstruct=False)
    bench.add_arm("(iv) features at visible patches alone", mimic, scores_of, tag)
    sizes = {}
    if options.ablations:
        conv = Arm("mr_mae:convmae_b16", HYBRID, steps)
        leak = dataclasses.replace(conv, changes={**HYBRID, "model.removed": "seen"})
        sizes = {"ViT": parameters(task, arm(mimic_weight=0.0)), "hybrid": parameters(task, conv)}
        score, tag = toy_task.encoder_scores, f"{tag}, probes alone"
        bench.add_arm("ConvMAE: pixels at hidden patches", conv, score, tag)
        bench.add_arm("ConvMAE with the leak", leak, score, tag)
    bench.write(
        {
            "claim": "(ii) > (i), (ii) >= (iii); ConvMAE >= MAE; the leak lowers loss and probes",
            "steps": steps,
            "batch size": task.batch_size,
            "learning rate": LR,
            "fine-tuning steps": FINETUNE_STEPS,
            "parameters of the encoder": sizes,
            "teacher": about_teacher,
            "picture": picture.name,
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
