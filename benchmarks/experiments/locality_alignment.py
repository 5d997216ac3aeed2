"""Does Locality Alignment put what is at a patch into its token, and keep what is in the image?

    python -m benchmarks.experiments.locality_alignment

Scenes of 2 to 4 small objects. The teacher is a ViT that was only ever told which classes an image
holds. It is trained on without labels, and its frozen tokens are probed for the class of every
patch (local) and for those of the image (global); the score is the recall, averaged over the
classes.

 * the original; locality-aligned; the same number of steps with whole images alone (a control for
   more training); the MIM precursor;
 * ablations: random masks alone, the last layer as target, cosine instead of squares.

Claim: the local score of the aligned one is above that of the original and of the control, and the
global one is about equal. Result: benchmarks/results/locality_alignment.json.
"""

import dataclasses
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import average_precision_score

from benchmarks.experiments import toy_images, toy_task
from benchmarks.experiments.toy_images import Images, Task
from benchmarks.experiments.toy_task import Arm, Scores, Trained, Workbench
from mim_jax.data.on_device import normalize
from mim_jax.evaluation.patch_probe import macro_recall, patch_global_recall, patch_local_recall
from mim_jax.method import Method, Variables
from mim_jax.methods.locality_alignment import LocalityAlignment
from mim_jax.models.vit import ViT

EPOCHS = {"linear": 30, "block": 10}
"""Of the probes."""

LR = 1e-3


@dataclasses.dataclass(frozen=True)
class WholeImages(LocalityAlignment):
    """Self-distillation without any hidden patch."""

    def masks(self, rng: jax.Array, batch: int) -> jax.Array:
        """All patches kept."""
        return jnp.ones((batch, self.tokens))


def whole_images(method: Method) -> Method:
    """The same method with whole images alone."""
    assert isinstance(method, LocalityAlignment)
    return WholeImages(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})


def probe_scores(method: Method, variables: Variables, task: Task, seed: int) -> Scores:
    """Local and global recall by a linear probe and by one block, from frozen tokens."""

    def tokens(images: Images) -> np.ndarray:
        return toy_task.tokens_of(method, variables, images)

    return token_scores(tokens(task.probe), tokens(task.test), task, seed, EPOCHS)


def token_scores(
    train: np.ndarray, test: np.ndarray, task: Task, seed: int, heads: dict[str, int]
) -> Scores:
    """`probe_scores` of given tokens `[n, tokens, width]`, by some heads."""
    scores = {}
    for head, epochs in heads.items():
        options: Any = dict(head=head, epochs=epochs, seed=seed)
        scores[f"local, {head}"] = patch_local_recall(
            train, task.probe.patches, test, task.test.patches, **options
        )
        scores[f"global, {head}"] = patch_global_recall(
            train, task.probe.labels, test, task.test.labels, **options
        )
    return scores


def pixel_scores(task: Task, seed: int) -> Scores:
    """`probe_scores` of the pixels of patches, linear alone."""

    def patches(images: np.ndarray) -> np.ndarray:
        side = task.patch
        grid = images.shape[1] // side
        cut = images.reshape(-1, grid, side, grid, side).swapaxes(2, 3)
        return cut.reshape(len(images), grid * grid, -1) / np.float32(255)

    train, test = patches(task.probe.images), patches(task.test.images)
    return token_scores(train, test, task, seed, {"linear": EPOCHS["linear"]})


def constant_losses(trained: Trained) -> Scores:
    """Squared errors of predictions that know nothing of the image or the mask.

    One value for all is what the scale of the targets is made for; one for every channel and token
    is a harder baseline, since the channels differ in their means. Of other losses, nothing.
    """
    method = trained.method
    assert isinstance(method, LocalityAlignment)
    if method.loss_name != "mse":
        return {}

    @jax.jit
    def errors(variables: Variables, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = normalize(images, toy_task.MEAN, toy_task.STD)
        kept = method.masks(jax.random.key(1), len(images))
        target = method.target(variables, images, kept)
        return jnp.var(target), jnp.var(target, axis=0).mean()

    one, each = errors(trained.variables, trained.task.test.images[:250])
    return {"loss of one value": float(one), "loss of a value for each channel": float(each)}


class PatchClassifier(nn.Module):
    """A ViT and a linear layer on every patch."""

    encoder: ViT
    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `[batch, tokens, classes]`."""
        return nn.Dense(self.classes)(self.encoder(images)[0][:, self.encoder.prefix_tokens :])


def supervised_recall(task: Task, encoder: ViT, steps: int, seed: int) -> Scores:
    """Recall of the classes of patches by an encoder that is trained on them, end to end."""
    data, classes = task.teaching, task.classes + 1
    model = PatchClassifier(encoder, classes)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-3, steps // 10, steps))

    def logits(params: Any, images: jax.Array) -> jax.Array:
        shares = (images / 255 - toy_task.MEAN[0]) / toy_task.STD[0]
        output = model.apply({"params": params}, shares)
        assert isinstance(output, jax.Array)
        return output

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            error = optax.softmax_cross_entropy_with_integer_labels(
                logits(params, images), jnp.maximum(labels, 0)
            )
            return jnp.sum(error * (labels >= 0)) / jnp.sum(labels >= 0)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *task.shape)))
    params, random = params["params"], np.random.default_rng(seed)
    state = optimizer.init(params)
    for _ in range(steps):
        ids = random.choice(len(data.images), task.batch_size, replace=False)
        params, state = step(params, state, data.images[ids], data.patches[ids])
    predict = jax.jit(lambda images: logits(params, images).argmax(axis=-1))
    batches = toy_task.evaluation_batches(task.test)
    guess = np.concatenate([np.asarray(predict(b["image"]))[b["valid"]] for b in batches])
    known = task.test.patches >= 0
    return {"local": macro_recall(task.test.patches[known], guess[known])}


def main(arguments: list[str] | None = None) -> int:
    """Runs everything and writes the result."""
    options = toy_task.arguments("locality_alignment", __doc__, 300, arguments)
    task = toy_images.scenes(options.full)
    bench = Workbench("locality_alignment", task, options)
    path, teacher, variables = bench.teacher(options.teacher_steps)
    encoder = toy_task.encoder_of(teacher)
    logits = toy_task.predictions(teacher, variables, task.test)
    about_teacher = {
        "steps": options.teacher_steps,
        "mean average precision": float(
            average_precision_score(task.test.labels, logits, average="macro")
        ),
        "recall": macro_recall(task.test.labels, (logits > 0).astype(int)),
    }
    print(f"teacher: {about_teacher}", flush=True)
    shared = {
        **bench.tower(path),
        "batch_size": 32,
        "optimizer.lr": LR,
        "schedule.min_lr": LR / 10,
        "data.crop_area": (0.5, 1.0),
    }

    def arm(steps: int, **changes: Any) -> Arm:
        fields = {f"model.{name}": value for name, value in changes.items()}
        return Arm("locality_alignment:tiny", {**shared, **fields}, steps)

    def score(trained: Trained) -> Scores:
        probes = probe_scores(trained.method, trained.variables, trained.task, trained.seed)
        return {**probes, **constant_losses(trained)}

    def original(seed: int) -> Scores:
        return probe_scores(teacher, variables, task, seed)

    def untrained(seed: int) -> Scores:
        initial = teacher.init(jax.random.key(seed), {"image": jnp.zeros((1, *task.shape))})
        return probe_scores(teacher, initial, task, seed)

    steps = options.steps
    key = ["locality probes", EPOCHS, options.teacher_steps]
    bench.add(
        "trained on the classes of patches",
        ["classes of patches", 2 * steps],
        lambda seed: supervised_recall(task, encoder, 2 * steps, seed),
        once=True,
    )
    bench.add("none: pixels of the patches", [*key, "pixels"], lambda s: pixel_scores(task, s))
    bench.add("untrained", [*key, "untrained"], untrained)
    bench.add("original", [*key, "original"], original)
    tag = str(key)
    bench.add_arm("aligned", arm(steps), score, tag)
    whole = dataclasses.replace(arm(steps), method=whole_images)
    bench.add_arm("control: whole images alone", whole, score, f"{tag} whole")
    bench.add_arm("MIM precursor", arm(steps, task="mim", skip_blocks=0), score, tag)
    if options.ablations:
        plain = arm(steps, complement=False, null_mask=False)
        bench.add_arm("aligned, random masks alone", plain, score, tag)
        bench.add_arm("aligned, last layer as target", arm(steps, skip_blocks=0), score, tag)
        bench.add_arm("aligned, cosine", arm(steps, loss="cosine"), score, tag)
    bench.write(
        {
            "claim": "local: aligned > original and control; global: about equal; loss below 1",
            "steps": steps,
            "batch size": 32,
            "learning rate": LR,
            "teacher": about_teacher,
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
