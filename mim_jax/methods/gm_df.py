"""GM-DF: Generalized Multi-Scenario Deepfake Detection (Lai et al., ACM Multimedia 2025).

CLIP learns forgeries of several collections at once: experts and norms carry what is special to a
collection, prompts and masked patches what is common to all. A meta-learning step trains the
experts on some collections so that they serve another one (section 3, figure 2). The authors'
code is not public; what neither paper nor figure fix is this project's choice.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mim_jax import config as configs
from mim_jax import losses, masking, targets
from mim_jax.layout import Layout
from mim_jax.layout.gm_df import gm_df_layout
from mim_jax.method import (
    Aux,
    Batch,
    Features,
    Group,
    Input,
    Method,
    Picture,
    Pretrained,
    Variables,
    register,
)
from mim_jax.methods.parts.pixel_decoder import reconstruction_picture
from mim_jax.models.adapted_clip import (
    ADAPTATION,
    MODES,
    SITES,
    Adaptation,
    AdaptedTower,
    Fusion,
    PatchDecoder,
    adapted,
    is_expert,
)
from mim_jax.models.experts import GATES
from mim_jax.models.forgery_detector import UNSEEN, Detected, ForgeryDetector
from mim_jax.models.text import TextTower
from mim_jax.models.tower import FAMILIES, Tower, build_tower
from mim_jax.models.transformer import Transformer
from mim_jax.models.vit import ViT

REAL, FAKE = 0, 1
"""Labels."""

ALIGNMENTS = ("moments", "w2", "w2_diagonal", "mmd")
"""Distances of the features of two sets of domains: see `mim_jax.losses`."""

CHOICES = {
    "expert_gate": GATES,
    "norm_site": SITES,
    "norm_mode": MODES,
    "alignment": ALIGNMENTS,
    "logit_of": ("head", "text"),
    "score_of": ("logit", "text", "both"),
    "meta": ("none", "first", "second"),
    "freeze": ("clip", "text", "nothing"),
}
"""Known values of the fields of `config.model` that are names."""


class Aligned(NamedTuple):
    """Features of the meta-train domains, `[rows, outputs]` without gradient, and their labels."""

    features: jax.Array
    labels: jax.Array


@register("gm_df")
@dataclasses.dataclass(frozen=True)
class GMDF(Method):
    """Detection of forged faces in several domains.

    Attributes:
        model: the detector.
        tower: CLIP's image tower as it was.
        kept: number of patches that are not masked.
        mask_weight: of the reconstruction.
        text_weight: of the alignment of images with prompts.
        alignment_weight: of the alignment of domains.
        alignment: one of `ALIGNMENTS`.
        by_class: align real and fake images by themselves.
        logit_of: what decides: the "head" or the similarity with "text".
        score_of: what `scores` gives: that "logit", the "text", or the mean of "both".
        temperature: tau, of a zero domain token, and its growth with the token's length.
        meta: "none" trains on all rows; "first" and "second" order meta-learning.
        meta_train_domains: k: a batch is k + 1 blocks of one domain each, the last of which is
            the meta-test domain.
        inner_rate: beta, of the inner step.
        outer_train_loss: the outer loss has the classification of the meta-train domains too.
        freeze: "clip" keeps both towers, "text" the text tower, "nothing" trains all.
        path: of CLIP's weights; may be empty where not all of CLIP is frozen.
    """

    model: ForgeryDetector
    tower: Tower
    kept: int
    mask_weight: float = 0.5
    text_weight: float = 0.3
    alignment_weight: float = 0.1
    alignment: str = "moments"
    by_class: bool = False
    logit_of: str = "head"
    score_of: str = "logit"
    temperature: tuple[float, float] = (0.07, 0.01)
    meta: str = "first"
    meta_train_domains: int = 1
    inner_rate: float = 1e-4
    outer_train_loss: bool = False
    freeze: str = "clip"
    path: str = ""

    streams: ClassVar[tuple[str, ...]] = ("mask",)
    groups: ClassVar[tuple[Group, ...]] = (
        Group("clip", rf"^text/|^visual/(?!encoder/({'|'.join(ADAPTATION)}))"),
    )
    no_decay: ClassVar[tuple[str, ...]] = ("^domain_embedding$", "_tokens$", "/positions$")

    @classmethod
    def build(cls, config: ml_collections.ConfigDict) -> "GMDF":
        """Reads `config.model`, `config.compute_dtype`, and the images of `config.data`.

        Raises:
            ValueError: for an unknown name, or if towers, images, domains, losses and meta step
                do not fit together.
        """
        model, dtype = config.model, jnp.dtype(config.compute_dtype)
        configs.check_choices(model, CHOICES)
        _check_meta(model)
        _check_batches(config)
        attention = model.attention or None
        tower = build_tower(model.clip, config.compute_dtype, attention=attention)
        encoder = tower.encoder
        given, expected = (
            (*map(int, config.data.image_size), config.data.channels),
            (*encoder.image_size, encoder.channels),
        )
        if given != expected or not encoder.class_token or not tower.outputs:
            raise ValueError(
                f"model.clip sees images {expected} with a class token and a projection to texts, "
                f"but data.image_size and data.channels are {given}, its class token "
                f"{encoder.class_token} and model.clip.outputs {tower.outputs}; make them fit."
            )
        adaptation = Adaptation(
            model.experts,
            model.expert_hidden,
            model.expert_gate,
            model.norm_site,
            model.norm_mode,
            tuple(model.second_order_layers),
        )
        image_tower = AdaptedTower(adapted(encoder, adaptation, remat=model.remat), tower.outputs)
        before, after = tuple(model.prompt_before), tuple(model.prompt_after)
        blocks = Transformer(
            model.text.depth,
            model.text.heads,
            model.text.mlp_ratio,
            dtype=dtype,
            causal=True,
            **FAMILIES[model.clip.family].blocks,
        )
        text = TextTower(
            model.text.vocabulary,
            model.text.length,
            model.text.width,
            blocks,
            outputs=tower.outputs,
            end_token=after[-1],
        )
        patches = math.prod(encoder.grid)
        decoder = PatchDecoder(
            patches,
            math.prod(encoder.patch_size) * encoder.channels,
            model.decoder_width,
            Transformer(model.decoder_depth, model.decoder_heads, dtype=dtype, attention=attention),
        )
        detector = ForgeryDetector(
            image_tower,
            text,
            Fusion(tower.outputs, dtype),
            decoder,
            model.domains,
            model.domain_width,
            (before, after),
        )
        return cls(
            detector,
            tower,
            masking.num_kept(patches, model.mask_ratio),
            model.mask_weight,
            model.text_weight,
            model.alignment_weight,
            model.alignment,
            model.align_by_class,
            model.logit_of,
            model.score_of,
            tuple(model.temperature),
            model.meta,
            model.meta_train_domains,
            model.inner_rate,
            model.outer_train_loss,
            model.freeze,
            model.clip.path,
        )

    @property
    def vit(self) -> ViT:
        """CLIP's image encoder, for its sizes."""
        return self.tower.encoder

    @property
    def tokens(self) -> int:
        """Number of patches in an image."""
        return math.prod(self.vit.grid)

    @property
    def reads(self) -> bool:
        """Whether the loss needs the text tower."""
        return self.text_weight > 0 or self.logit_of == "text"

    @property
    def frozen(self) -> tuple[str, ...]:
        """As much of CLIP as `freeze` says, and what has no influence on the loss."""
        adaptation = self.model.visual.encoder.transformer.adaptation
        patterns = ["^logit_scale$", "^visual/projection/"]
        if self.freeze == "clip":
            own = list(ADAPTATION)
            if adaptation.site == "pre":  # both norms are norms of the domain then
                own.append(r"transformer/blocks_\d+/norm[12]/")
            patterns.append(rf"^visual/encoder/(?!{'|'.join(own)})")
        if self.freeze != "nothing" or not self.reads:
            patterns.append("^text/")
        if not self.reads:
            patterns += ["^domain_tokens$", "^class_tokens$"]
        if self.logit_of == "text":
            patterns.append("^head/")
        if not self.mask_weight:
            patterns += ["^decoder/", "^visual/encoder/mask_token$"]
        if not adaptation.experts and adaptation.site == "output":
            patterns.append("^domain_embedding$")
        return tuple(patterns)

    @property
    def pretrained(self) -> tuple[Pretrained, ...]:
        """Both towers of CLIP, and its projection as the start of the fusion's."""
        if not self.path and self.freeze != "clip":
            return ()
        field, own = "model.clip.path", tuple(rf"encoder/{pattern}" for pattern in ADAPTATION)
        return (
            Pretrained("visual", self.tower, self.path, field, fresh=own),
            Pretrained("text", self.model.text, self.path, field),
            Pretrained("fusion", self.tower, self.path, field, fresh=("(?!projection/kernel$)",)),
        )

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Images of CLIP's size, labels (0 real, 1 fake) and numbers of training domains."""
        image = Input((*self.vit.image_size, self.vit.channels))
        return {"image": image, "label": Input((), "int"), "domain": Input((), "int")}

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Initial parameters; the fusion projects as CLIP does."""
        images = jnp.zeros((1, *batch["image"].shape[1:]))
        mask = jnp.zeros((1, self.tokens))
        params = dict(self.model.init(rng, images, jnp.zeros((1,), jnp.int32), mask)["params"])
        projection = {**params["fusion"]["projection"], **params["visual"]["projection"]}
        return {"params": {**params, "fusion": {**params["fusion"], "projection": projection}}}

    def detect(self, variables: Variables, batch: Batch) -> Detected:
        """What is seen in whole images; a batch without domains is of unseen ones."""
        images = batch["image"]
        domain = batch.get("domain", jnp.full(images.shape[:1], UNSEEN))
        found = self.model.apply(variables, images, domain, method=ForgeryDetector.detect)
        assert isinstance(found, Detected)
        return found

    def read(self, variables: Variables) -> jax.Array:
        """Text features of all prompts, `[domains + 1, 2, outputs]`; the last are of any domain."""
        texts = self.model.apply(variables, method=ForgeryDetector.read)
        assert isinstance(texts, jax.Array)
        return texts

    def temperatures(self, variables: Variables) -> jax.Array:
        """Tau of every domain, float32 `[domains + 1]` (equation 10)."""
        base, growth = self.temperature
        squares = jnp.sum(variables["params"]["domain_tokens"].astype(jnp.float32) ** 2, axis=-1)
        # The length has no gradient at zero.
        return base + growth * jnp.sqrt(jnp.maximum(squares, 1e-24))

    def similarities(
        self, variables: Variables, feature: jax.Array, domain: jax.Array
    ) -> jax.Array:
        """Cosine with the prompts of real and fake over tau, float32 `[batch, 2]`.

        Args:
            variables: of the model.
            feature: `[batch, outputs]`.
            domain: int `[batch]`; unseen ones have the prompts of any domain.
        """
        row = self.model.row(domain)
        texts = targets.unit_length(self.read(variables))[row]  # [B, 2, O]
        cosine = jnp.einsum("bo,bco->bc", targets.unit_length(feature), texts)
        return cosine / self.temperatures(variables)[row][:, None]

    def reconstruct(self, variables: Variables, batch: Batch, mask: jax.Array) -> jax.Array:
        """Prediction of all patches with those masked where `mask [batch, patches]` is 1."""
        images = batch["image"]
        domain = batch.get("domain", jnp.full(images.shape[:1], UNSEEN))
        pred = self.model.apply(variables, images, domain, mask, method=ForgeryDetector.reconstruct)
        assert isinstance(pred, jax.Array)
        return pred

    def logits(self, variables: Variables, batch: Batch, found: Detected) -> jax.Array:
        """What the classification loss takes, float32 `[batch]`."""
        if self.logit_of == "head":
            return found.logit
        similar = self.similarities(variables, found.feature, batch["domain"])
        return similar[:, FAKE] - similar[:, REAL]

    def distance(self, train: Aligned, features: jax.Array, labels: jax.Array) -> jax.Array:
        """L_dal: how far features are from those of the meta-train domains.

        Args:
            train: what to align with.
            features: `[batch, outputs]`.
            labels: int `[batch]`.
        """
        fixed = jax.lax.stop_gradient(train.features)

        def of_rows(first: jax.Array, second: jax.Array) -> jax.Array:
            weights = (first.astype(jnp.float32), second.astype(jnp.float32))
            if self.alignment == "mmd":
                return losses.mean_discrepancy(fixed, features, weights)
            pair = losses.moments(fixed, weights[0]), losses.moments(features, weights[1])
            if self.alignment == "moments":
                return losses.moment_distance(*pair)
            return losses.wasserstein_distance(*pair, diagonal=self.alignment == "w2_diagonal")

        if not self.by_class:
            return of_rows(jnp.ones(len(fixed)), jnp.ones(len(features)))
        parts = [of_rows(train.labels == label, labels == label) for label in (REAL, FAKE)]
        return (parts[0] + parts[1]) / 2

    def reconstruction_loss(self, images: jax.Array, pred: jax.Array, mask: jax.Array) -> jax.Array:
        """L_mim: mean squared error over masked patches, each normalized by itself (eq. 6)."""
        patches = targets.patchify(images.astype(jnp.float32), self.vit.patch_size)
        error = losses.squared_error(pred, targets.normalize_patches(patches))
        return losses.masked_mean(error, mask)

    def objective(
        self, variables: Variables, batch: Batch, noise: jax.Array, train: Aligned | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """L_total and its terms (equation 14).

        Args:
            variables: of the model.
            batch: images, labels and domains.
            noise: `[batch, patches]`, uniform in [0, 1); the largest values are masked.
            train: of the meta-train domains; None for no alignment.
        """
        labels, found = batch["label"], self.detect(variables, batch)
        logits = self.logits(variables, batch, found)
        terms = {"l_cls": losses.binary_cross_entropy(logits, labels)}
        total = terms["l_cls"]
        if self.text_weight:
            similar = self.similarities(variables, found.feature, batch["domain"])
            terms["l_sis"] = losses.cross_entropy(similar, labels)
            total += self.text_weight * terms["l_sis"]
        if self.mask_weight:
            mask = masking.random_masking(noise, self.kept).mask
            pred = self.reconstruct(variables, batch, mask)
            terms["l_mim"] = self.reconstruction_loss(batch["image"], pred, mask)
            total += self.mask_weight * terms["l_mim"]
        if self.alignment_weight and train is not None:
            terms["l_dal"] = self.distance(train, found.feature, labels)
            total += self.alignment_weight * terms["l_dal"]
        metrics = {"accuracy": jnp.mean((logits > 0) == (labels == FAKE))}
        if self.reads:
            norms = jnp.linalg.norm(variables["params"]["domain_tokens"][:-1], axis=-1)
            metrics["domain_token_norm"] = norms.mean()
        if self.model.visual.encoder.transformer.adaptation.experts:
            entropies = [jax.scipy.special.entr(x).sum(axis=-1).mean() for x in found.seen.routes]
            metrics["expert_entropy"] = jnp.stack(entropies).mean()
        return total, terms | jax.lax.stop_gradient(metrics)

    def inner_step(
        self, variables: Variables, batch: Batch
    ) -> tuple[dict[str, Any], jax.Array, Aligned]:
        """One step of gradient descent of the experts on meta-train domains (equation 13).

        Args:
            variables: of the model.
            batch: the meta-train domains.

        Returns:
            The variables with the experts after the step; L_cls before it; and the features
            before it.
        """
        flat = flatten_dict(dict(variables["params"]), sep="/")
        experts = {path: leaf for path, leaf in flat.items() if is_expert(path)}

        def loss_of(experts: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            whole = {**variables, "params": unflatten_dict({**flat, **experts}, sep="/")}
            found = self.detect(whole, batch)
            logits = self.logits(whole, batch, found)
            return losses.binary_cross_entropy(logits, batch["label"]), found.feature

        (loss, features), gradient = jax.value_and_grad(loss_of, has_aux=True)(experts)
        if self.meta == "first":
            gradient = jax.lax.stop_gradient(gradient)
        fast = {path: leaf - self.inner_rate * gradient[path] for path, leaf in experts.items()}
        after = {**variables, "params": unflatten_dict({**flat, **fast}, sep="/")}
        return after, loss, Aligned(jax.lax.stop_gradient(features), batch["label"])

    def halves(self, batch: Batch) -> tuple[Batch, Batch]:
        """Rows of the meta-train domains, and of the meta-test domain.

        Raises:
            ValueError: if the batch is not made of equal blocks.
        """
        rows, blocks = batch["image"].shape[0], self.meta_train_domains + 1
        if rows % blocks:
            raise ValueError(
                f"a batch of {rows} rows cannot be cut into {blocks} equal blocks, those of "
                f"{self.meta_train_domains} meta-train domains and one meta-test domain; set "
                f"batch_size to a multiple of {blocks} x accumulate."
            )
        cut = rows - rows // blocks
        return (
            {name: value[:cut] for name, value in batch.items()},
            {name: value[cut:] for name, value in batch.items()},
        )

    def loss(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array], step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """L_total of the meta-test domain after the inner step, under a fresh mask."""
        if self.meta == "none":
            noise = jax.random.uniform(rngs["mask"], (batch["image"].shape[0], self.tokens))
            total, terms = self.objective(variables, batch, noise)
            return total, Aux(terms)
        train, test = self.halves(batch)
        noise = jax.random.uniform(rngs["mask"], (test["image"].shape[0], self.tokens))
        fast, inner, aligned = self.inner_step(variables, train)
        total, terms = self.objective(fast, test, noise, aligned)
        if self.outer_train_loss:
            total += inner
        return total, Aux({**terms, "l_cls_meta_train": inner})

    def scores(self, variables: Variables, batch: Batch) -> jax.Array:
        """Probability that an image is fake, float32 `[batch]`.

        A batch without `domain`, or rows where it is -1, are of unseen domains: these have the
        mean of the embeddings and the prompts of any domain.
        """
        domain = batch.get("domain", jnp.full(batch["image"].shape[:1], UNSEEN))
        batch = {**batch, "domain": domain}
        found = self.detect(variables, batch)
        scores = []
        if self.score_of != "text":
            scores.append(jax.nn.sigmoid(self.logits(variables, batch, found)))
        if self.score_of != "logit":
            similar = self.similarities(variables, found.feature, domain)
            scores.append(jax.nn.softmax(similar)[:, FAKE])
        return sum(scores, jnp.zeros(len(domain))) / len(scores)

    def features(self, variables: Variables, batch: Batch) -> Features:
        """v, and the patch tokens after the final norm."""
        found = self.detect(variables, batch)
        return Features(found.feature, found.seen.normalized[:, 1:], self.vit.grid)

    def pictures(
        self, variables: Variables, batch: Batch, rngs: Mapping[str, jax.Array]
    ) -> dict[str, Picture]:
        """What `reconstruction_picture` shows; nothing if masked patches are not trained."""
        if not self.mask_weight:
            return {}
        images = batch["image"].astype(jnp.float32)
        noise = jax.random.uniform(rngs["mask"], (images.shape[0], self.tokens))
        mask = masking.random_masking(noise, self.kept).mask
        pred = self.reconstruct(variables, {**batch, "image": images}, mask)
        picture = reconstruction_picture(images, pred, mask, self.vit, normalized=True)
        return {"reconstruction": picture}

    def layout(self) -> Layout:
        """CLIP in OpenAI's names, and the rest beside it."""
        return gm_df_layout(self.model, self.tower)

    def sized_like(self, state: Mapping[str, np.ndarray], known: Mapping[str, Any]) -> "GMDF":
        """This method with the number of domains of a file; other sizes stay."""
        if "domain_embed.weight" not in state:
            raise ValueError("it has no domain_embed.weight, so it is no checkpoint of GM-DF.")
        domains = len(state["domain_embed.weight"])
        return dataclasses.replace(self, model=self.model.clone(domains=domains))


def _check_meta(model: ml_collections.ConfigDict) -> None:
    """Raises `ValueError` if domains, meta step and alignment do not fit together."""
    if model.domains < 1:
        raise ValueError(
            f"model.domains is {model.domains}: set it to the number of training domains, or train "
            "on a mixture of several sources, which tells it."
        )
    if model.meta == "none":
        if model.alignment_weight:
            raise ValueError(
                "model.alignment_weight is not 0, but only a meta step (model.meta 'first' or "
                "'second') has domains to align: set it to 0."
            )
        return
    if not 1 <= model.meta_train_domains < model.domains:
        raise ValueError(
            f"model.meta_train_domains is {model.meta_train_domains}; with {model.domains} "
            "domains, of which one is for the meta-test, it must lie between 1 and "
            f"{model.domains - 1}. For one domain alone set model.meta to 'none'."
        )
    if not model.experts:
        raise ValueError(
            "model.experts is 0, but the meta step trains experts: set model.meta to 'none'."
        )


def _check_batches(config: ml_collections.ConfigDict) -> None:
    """Raises `ValueError` if the batches do not tell domains, or not in the meta step's blocks."""
    model, data = config.model, config.data
    if data.batches != "domains":
        raise ValueError(
            f"data.batches is {data.batches!r}, but GM-DF needs the domain of every image: set it "
            "to 'domains'."
        )
    if model.meta != "none" and data.domains_per_batch != model.meta_train_domains + 1:
        raise ValueError(
            f"data.domains_per_batch is {data.domains_per_batch}, but model.meta_train_domains is "
            f"{model.meta_train_domains}: a batch has a block for each of these and one for the "
            "meta-test domain, so set data.domains_per_batch to "
            f"{model.meta_train_domains + 1}, or model.meta to 'none'."
        )
