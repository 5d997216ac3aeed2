"""Locality Alignment (Covert et al., 2025): MaskEmbed for trained ViTs, and its MIM precursor."""

from typing import Any

import ml_collections

from mim_jax.config import EMBEDDED_DATA
from mim_jax.models.tower import CLIP, HALF, IMAGENET, tower_settings

# Tower, statistics of its images, and changes of its fields.
_BACKBONES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "clip_b16": ("clip_b16", CLIP, {}),
    "clip_l14": ("clip_l14", CLIP, {}),
    "clip_l14_336": ("clip_l14_336", CLIP, {}),
    "siglip_b16": ("siglip_b16", HALF, {}),
    "siglip_so400m": ("siglip_so400m", HALF, {}),
    "siglip_so400m_384": ("siglip_so400m_384", HALF, {}),
    "vit_t16": ("vit_t16", HALF, {}),
    "vit_s16": ("vit_s16", HALF, {}),
    "vit_b16": ("vit_b16", HALF, {}),
    "vit_l16": ("vit_l16", HALF, {}),
    "dinov2_b14_registers": ("dinov2_b14_registers", IMAGENET, {"image_size": 224}),
    "dino_b16": ("dino_b16", IMAGENET, {}),
    "mae_b16": ("mae_b16", IMAGENET, {}),
    "mim_clip_b16": ("clip_b16", CLIP, {}),
    "ablation_b16": ("vit_b16", HALF, {}),
}

VARIANTS = (*_BACKBONES, "tiny")
"""The published alignments: CLIP, SigLIP, supervised and DINOv2 backbones on ImageNet-21k, DINO and
MAE on ImageNet-1K; the MIM precursor; the base of the paper's ablations; and one for a laptop on
the embedded images."""

_LARGE = ("clip_l14", "clip_l14_336", "siglip_so400m", "siglip_so400m_384", "vit_l16")
_ON_IMAGENET_1K = ("dino_b16", "mae_b16", "ablation_b16")


def get_config(variant: str = "clip_b16") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`.

    The paper's ablations start from `ablation_b16`:

    * loss: `model.loss=cosine`;
    * masks: `model.mask_sampler=uniform` with `model.null_mask=False`, and `model.complement=False`
      as well; without both, `bernoulli` with `model.kept_share` 0.25, 0.5 or 0.75, or `blockwise`
      with 0.4;
    * target: `model.skip_blocks=0` for the last block, and `model.prefix_only=True` on top of it
      for the class token alone;
    * augmentation: `model.mixup=0.5`, `model.cutmix=1.0`, `data.augment=rand-m9-mstd0.5-inc1`;
    * length: `epochs` and `schedule.warmup_epochs`; of 50 and 100 epochs with `model.logit_cap=30`.
    """
    name, (mean, std), changes = _BACKBONES.get(variant, ("tiny", ((), ()), {}))
    large = variant in _LARGE
    config = ml_collections.ConfigDict(
        dict(
            method="locality_alignment",
            model=dict(
                # "mask_embed"; or "mim", its precursor: the encoder sees masked images itself and
                # predicts the teacher's tokens of the whole one without decoder.
                task="mask_embed",
                # The frozen tower, from which the student starts, too: set its path, and see
                # `mim_jax.models.tower.TOWERS`.
                teacher=tower_settings(name, **changes),
                # Last blocks that the teacher leaves out.
                skip_blocks=1,
                # Compare the class token of the whole teacher alone; needs skip_blocks=0.
                prefix_only=False,
                # "mse", "cosine", "l1", "masked_mse" (hidden patches), "unmasked_mse" (kept ones).
                loss="mse",
                # "uniform" (a share of kept patches that is uniform in [0, 1]), "bernoulli" or
                # "blockwise".
                mask_sampler="uniform",
                # Share of kept patches under "bernoulli", and the least one under "blockwise"
                # (published: 0.4).
                kept_share=0.5,
                # Use also the complement of every mask, and every image whole.
                complement=True,
                null_mask=True,
                # Bound of the student's attention logits, where it is used later as well; 0 for
                # none, as for BEiT.
                logit_cap=30.0,
                # What follows the encoder: "linear" or "mlp", both zero at first.
                output_head="linear",
                # Train the decoder alone, on the encoder as it is.
                freeze_student=False,
                # Width and heads; 0 for those of the encoder.
                decoder_width=0,
                decoder_heads=0,
                decoder_depth=2,
                # Initial factor on the branches of the decoder's blocks.
                decoder_layer_scale=1e-6,
                # Of the norms that are new: the student's last one, and those of the decoder.
                norm_epsilon=1e-5,
                # Batches that measure the variance of the teacher's outputs before the first step.
                calibration_batches=50,
                mixup=0.0,
                cutmix=0.0,
                # Compile one block and loop over it; saves compile time for deep models.
                scan=False,
                # "none", "dots" or "full": what the backward pass computes again to save memory.
                remat="none",
                # Implementation of jax.nn.dot_product_attention, where logits are not bounded: "",
                # "xla" or "cudnn".
                attention="",
            ),
            data=dict(
                # ImageNet-21k: `folder:PATH` or another source that you have.
                source="folder:imagenet21k",
                # Those of the teacher.
                mean=mean,
                std=std,
                crop="keep_ratio",
                crop_area=(0.08, 1.0),
                workers=8,
            ),
            batch_size=1024,
            epochs=5.0,
            optimizer=dict(
                lr=2e-4 if large else 3e-4,
                b1=0.9,
                b2=0.95,
                weight_decay=0.01,
                # Biases, norms and positions, too.
                decay_all=True,
                clip_norm=1.0,
            ),
            schedule=dict(warmup_epochs=0.0, min_lr=2e-5 if large else 3e-5),
            evaluate=dict(source="tfds:imagenet2012", test_split="validation"),
        )
    )
    config.data.image_size = config.model.teacher.image_size
    if variant in _ON_IMAGENET_1K:
        config.data.source = "tfds:imagenet2012"
        config.epochs = 50.0
        # Starts at 0; the official one starts at 3e-5.
        config.schedule.warmup_epochs = 1.0
    if variant == "ablation_b16":
        config.model.logit_cap = 0.0
        config.epochs = 25.0
    if variant == "mim_clip_b16":
        config.model.update(task="mim", skip_blocks=0)
    if variant == "tiny":
        config.model.teacher.path = "tiny"
        config.model.calibration_batches = 5
        config.data = dict(EMBEDDED_DATA, crop="keep_ratio")
        config.batch_size = 128
        config.epochs = 15.0
        config.optimizer.lr = 1e-3
        config.schedule.min_lr = 1e-4
        config.log = dict(every_steps=50)
        config.checkpoint = dict(every_steps=200)
        config.evaluate = dict(protocols=("knn", "linear"), crop_ratio=1.0)
    return config
