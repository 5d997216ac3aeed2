"""Does CAE's alignment make predicted latents those of the encoder, and what is that good for?

    python -m benchmarks.experiments.cae

Fashion-MNIST; the target of a masked patch is the nearest of 64 k-means centres of patches. Equal
numbers of steps on the same encoder, half of the patches masked in blocks:

 * CAE; CAE without alignment;
 * like MAE: a decoder that sees the visible latents, and no regressor.

Claims: with alignment predicted latents agree with those that the encoder gives for the masked
patches themselves, and only then the decoder reads the latter as well as the former; the probes of
CAE are not below those without alignment. Result: benchmarks/results/cae.json.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.cluster import MiniBatchKMeans

from benchmarks.experiments import toy_images, toy_task
from benchmarks.experiments.maskalign import add_baselines
from benchmarks.experiments.toy_images import Task
from benchmarks.experiments.toy_task import Arm, Scores, Trained, Workbench
from mim_jax import losses, masking, targets
from mim_jax.data.on_device import normalize
from mim_jax.evaluation.attentive_probe import AttentiveHead
from mim_jax.method import Batch, Method, Variables
from mim_jax.methods.cae import CAE, ContextAutoencoder, Prediction
from mim_jax.models.masked_decoder import MaskedDecoder

LR = 1.5e-3
CODES = 64
MASKED = 8
FINETUNE_STEPS = 200

MODEL = {
    "model.target": "tokens",
    "model.tokenizer.vocabulary": CODES,
    "model.tokenizer.hidden": 4,
    "model.tokenizer.channels": 1,
    "model.decoder_width": toy_task.WIDTH,
    "model.decoder_depth": 1,
    "model.decoder_heads": toy_task.HEADS,
    "model.regressor_depth": 2,
    "model.masked": MASKED,
    "model.min_block": 2,
    "optimizer.lr": LR,
    "schedule.min_lr": 0.0,
}


@dataclasses.dataclass(frozen=True, eq=False)
class CodedPatches(CAE):
    """CAE whose tokens are the nearest of some patches, in place of a tokenizer's.

    Attributes:
        centres: `[codes, values]`, normalized patches.
    """

    centres: Any = None

    def targets(
        self, variables: Variables, batch: Batch, visible: jax.Array, masked: jax.Array
    ) -> jax.Array:
        """Ids of the nearest centres, int32 `[batch, masked]`."""
        patches = targets.patchify(batch["image"], self.encoder.patch_size)
        patches = masking.gather_tokens(patches, masked)
        return jnp.argmin(jnp.sum((patches[:, :, None] - self.centres) ** 2, axis=-1), axis=-1)


class SeeingAutoencoder(ContextAutoencoder):
    """As MAE: the decoder gets the visible latents and mask tokens; there is no regressor.

    Attributes:
        seeing: the decoder.
    """

    seeing: MaskedDecoder | None = None

    def __call__(
        self,
        images: jax.Array,
        visible: jax.Array,
        masked: jax.Array,
        drop_path_noise: Sequence[Any] = (None, None, None, None),
    ) -> Prediction:
        """Predicts masked patches; there are no latents of theirs."""
        assert self.seeing is not None
        latent, _ = self.encoder(images, visible, drop_path_noise[0])
        restore = jnp.argsort(jnp.concatenate([visible, masked], axis=1), axis=1)
        pred = masking.gather_tokens(self.seeing(latent, restore), masked)
        return Prediction(latent, [], pred, None, pred)


def with_codes(method: Method, centres: np.ndarray, seeing: bool = False) -> Method:
    """The method with coded patches as target, and on request MAE's decoder."""
    assert isinstance(method, CAE)
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    fields["tokenizer"] = None
    if seeing:
        parts = method.model
        blocks = parts.decoder.transformer
        # As many blocks as regressor and decoder have.
        blocks = blocks.clone(depth=blocks.depth + parts.regressor.settings.depth)
        decoder = MaskedDecoder(parts.encoder.grid, CODES, parts.regressor.width, blocks)
        fields["model"] = SeeingAutoencoder(
            parts.encoder, parts.regressor, parts.decoder, align=False, seeing=decoder
        )
    return CodedPatches(**fields, centres=jnp.asarray(centres))


def patch_centres(task: Task) -> np.ndarray:
    """k-means centres of normalized patches, `[codes, values]`."""
    images = normalize(jnp.asarray(task.unlabelled.images[:4000]), toy_task.MEAN, toy_task.STD)
    patches = np.asarray(targets.patchify(images, (task.patch, task.patch)))
    patches = patches.reshape(-1, patches.shape[-1])
    found = MiniBatchKMeans(CODES, random_state=0, n_init=3, batch_size=4096).fit(patches)
    return np.asarray(found.cluster_centers_, np.float32)


def latent_scores(trained: Trained) -> Scores:
    """How well masked patches of test images are predicted, as codes and as latents.

    The cosine is between predicted latents and those of the encoder on the masked patches; the
    centred one, after both have lost their mean over images and patches.
    """
    method, task = trained.method, trained.task
    assert isinstance(method, CodedPatches)
    seeing = isinstance(method.model, SeeingAutoencoder)
    whole = method if seeing else dataclasses.replace(method, model=method.model.clone(align=True))

    def decode(model: ContextAutoencoder, latents: jax.Array, masked: jax.Array) -> jax.Array:
        table = jnp.asarray(model.position_table()[1:])
        positions = jnp.broadcast_to(table, (len(latents), *table.shape))
        return model.decoder(latents + masking.gather_tokens(positions, masked))

    @jax.jit
    def compare(variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
        images = normalize(images, toy_task.MEAN, toy_task.STD)
        visible, masked = whole.choose(jax.random.key(3), len(images))
        labels = whole.targets(variables, {"image": images}, visible, masked)
        output = whole.predict(variables, images, visible, masked)
        scores = {"token accuracy": jnp.mean(output.pred.argmax(axis=-1) == labels)}
        if output.aligned is None:
            return scores
        params = {"params": variables["params"]}
        logits: Any = whole.model.apply(params, output.aligned, masked, method=decode)
        scores["token accuracy from true latents"] = jnp.mean(logits.argmax(axis=-1) == labels)
        ours, true = (x.reshape(-1, x.shape[-1]) for x in (output.predicted, output.aligned))
        scores["cosine"] = 1 - jnp.mean(losses.cosine_distance(ours, true))
        ours, true = ours - ours.mean(axis=0), true - true.mean(axis=0)
        scores["centred cosine"] = 1 - jnp.mean(losses.cosine_distance(ours, true))
        scores["deviation of true latents"] = jnp.sqrt(jnp.mean(true**2))
        return scores

    values = [compare(trained.variables, task.test.images[i : i + 500]) for i in (0, 500)]
    return {name: float(np.mean([float(v[name]) for v in values])) for name in values[0]}


def attentive_accuracy(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], seed: int
) -> float:
    """Test accuracy of CAE's attentive head on frozen tokens, trained by Adam for 30 epochs."""
    (tokens, labels), classes = train, int(train[1].max()) + 1
    mean, deviation = tokens.mean(axis=(0, 1)), tokens.std(axis=(0, 1)) + 1e-6
    head, size, epochs = AttentiveHead(classes), min(100, len(tokens)), 30
    random, count = np.random.default_rng(seed), len(tokens) // size
    orders = [random.permutation(len(tokens))[: count * size] for _ in range(epochs)]
    order = jnp.asarray(np.concatenate(orders).reshape(-1, size))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, len(order)))

    @jax.jit
    def trained(variables: Any, tokens: jax.Array, labels: jax.Array) -> Any:
        def step(carry: Any, ids: jax.Array) -> tuple[Any, None]:
            params, statistics, state = carry

            def loss(params: Any) -> Any:
                logits, changed = head.apply(
                    {"params": params, "batch_stats": statistics},
                    tokens[ids],
                    train=True,
                    mutable=["batch_stats"],
                )
                return losses.cross_entropy(logits, labels[ids]), changed["batch_stats"]

            gradient, statistics_ = jax.grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), statistics_, state), None

        params, statistics = variables["params"], variables["batch_stats"]
        carry, _ = jax.lax.scan(step, (params, statistics, optimizer.init(params)), order)
        return {"params": carry[0], "batch_stats": carry[1]}

    def standardized(x: np.ndarray) -> jax.Array:
        return jnp.asarray((x - mean) / deviation)

    start = head.init(jax.random.key(seed), standardized(tokens[:2]), train=True)
    variables = trained(start, standardized(tokens), jnp.asarray(labels))
    logits: Any = head.apply(variables, standardized(test[0]), train=False)
    return float(np.mean(np.asarray(logits).argmax(axis=1) == test[1]))


def scores_of(trained: Trained) -> Scores:
    """Probes, the attentive one among them, fine-tuning, and `latent_scores`."""
    task = trained.task

    tokens = {
        part: toy_task.tokens_of(trained.method, trained.variables, getattr(task, part))
        for part in ("probe", "test")
    }
    attentive = attentive_accuracy(
        (tokens["probe"], task.probe.labels), (tokens["test"], task.test.labels), trained.seed
    )
    few = len(task.few.images)
    donor = (trained.method, trained.variables)
    finetuned = toy_task.finetuned_accuracy(donor, task, trained.seed, FINETUNE_STEPS, family="cae")
    return {
        **toy_task.probe_scores(
            lambda x: tokens["probe" if x is task.probe else "test"].mean(axis=1), task
        ),
        f"attentive, {len(task.probe.images):,} labels": attentive,
        f"fine-tuned, {few} labels": finetuned,
        **latent_scores(trained),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs everything and writes the result."""
    options = toy_task.arguments("cae", __doc__, 500, arguments)
    task, steps = toy_images.fashion(options.full), options.steps
    bench = Workbench("cae", task, options)
    centres = patch_centres(task)
    plain = functools.partial(with_codes, centres=centres)
    seeing = functools.partial(with_codes, centres=centres, seeing=True)

    def arm(method: Any, weight: float, steps: int = steps) -> Arm:
        return Arm("cae:tiny", {**MODEL, "model.align_weight": weight}, steps, method)

    tag = f"cae, {FINETUNE_STEPS}"
    add_baselines(bench, options.teacher_steps // 2)
    bench.add_arm("CAE, untrained", arm(plain, 2.0, 0), scores_of, tag)
    bench.add_arm("CAE", arm(plain, 2.0), scores_of, tag)
    bench.add_arm("CAE without alignment", arm(plain, 0.0), scores_of, tag)
    bench.add_arm("like MAE", arm(seeing, 0.0), scores_of, f"{tag}, seeing")
    patches = targets.patchify(
        normalize(jnp.asarray(task.test.images[:500]), toy_task.MEAN, toy_task.STD),
        (task.patch, task.patch),
    )
    ids = jnp.argmin(jnp.sum((patches[:, :, None] - centres) ** 2, axis=-1), axis=-1)
    shares = np.bincount(np.asarray(ids).ravel(), minlength=CODES) / ids.size
    bench.write(
        {
            "claim": "cosine and accuracy from true latents: CAE > without alignment; probes: >=",
            "steps": steps,
            "batch size": task.batch_size,
            "learning rate": LR,
            "codes": {"number": CODES, "share of the most frequent": float(shares.max())},
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
