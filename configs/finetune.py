"""Fine-tuning a pre-trained encoder as a classifier: the official recipes of MAE and its heirs."""

import ml_collections

from mim_jax.config import EMBEDDED_DATA
from mim_jax.models.tower import CLIP

VARIANTS = (
    "vit_b16",
    "vit_l16",
    "vit_h14",
    "cae_b16",
    "cae_l16",
    "cae_v2_b16",
    "cae_v2_s16",
    "cae_v2_t16",
    "maskalign_b16",
    "maskalign_l16",
    "convmae_b16",
    "dmjd_b16",
    "dmjd_l16",
    "locality_b16",
    "locality_l14",
    "locality_l14_336",
    "adapt",
    "tiny",
)
"""MAE's three sizes on ImageNet-1K; what CAE (and v2), MaskAlign, ConvMAE (and MR-MAE), DMJD and
Locality Alignment do there; one that derives its settings from a folder of labelled images and the
weights to start from; and one that goes on from a run of `mae:tiny`."""

HYBRID = ("convmae_b16", "dmjd_b16", "dmjd_l16")
"""Variants with ConvMAE's encoder."""


def get_config(variant: str = "vit_b16") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    config = ml_collections.ConfigDict(
        dict(
            method="finetune",
            model=dict(
                **(_conv_vit() if variant in HYBRID else _vit()),
                mlp_ratio=4.0,
                position_grid=(),
                # 0 takes the number of the data.
                num_classes=0,
                # "single", "multi" (any number of classes for an image), or "" for the data's.
                labels="",
                # "mean" of the patch tokens with a norm of its own, "cls" for the class token, or
                # "block": a transformer block on all tokens, and their mean (Locality Alignment).
                pool="mean",
                drop_path=0.1,
                # Factor on the learning rate from one layer to the one below.
                layer_decay=0.65,
                # Parameters of the Beta distributions; 0 turns the one or the other off.
                mixup=0.8,
                cutmix=1.0,
                # Of cutmix rather than mixup, where both are on.
                cutmix_probability=0.5,
                smoothing=0.1,
                # Probability of random erasing.
                erasing=0.25,
                scan=False,
                remat="none",
                attention="",
            ),
            data=dict(
                source="tfds:imagenet2012",
                # "" takes what is not needed for testing.
                split="",
                image_size=(224, 224),
                crop_area=(0.08, 1.0),
                augment="rand-m9-mstd0.5-inc1",
                workers=8,
            ),
            batch_size=1024,
            epochs=100.0,
            optimizer=dict(base_lr=5e-4, b1=0.9, b2=0.999, weight_decay=0.05),
            schedule=dict(warmup_epochs=5.0, min_lr=1e-6),
            # The data's own test split, or else the last tenth of the images, not trained on.
            evaluate=dict(protocols=("classification",), train_split="", test_split=""),
        )
    )
    if variant in ("vit_l16", "vit_h14"):
        config.model.update(size="large", drop_path=0.2, layer_decay=0.75)
        config.optimizer.base_lr = 1e-3
        config.epochs = 50.0
    if variant == "vit_h14":
        config.model.update(size="huge", drop_path=0.3, patch_size=(14, 14))
    if variant.startswith("cae"):
        _set_cae(config, variant)
    if variant.startswith("maskalign"):
        config.optimizer.base_lr = 3e-4
        config.model.update(drop_path=0.2, layer_decay=0.55)
    if variant == "maskalign_l16":
        config.model.update(size="large", drop_path=0.4, layer_decay=0.75)
        config.epochs = 50.0
    if variant.startswith("dmjd"):
        config.model.conv_mlp_ratios = (8.0, 8.0)
    if variant == "dmjd_l16":
        config.model.update(size="large", drop_path=0.2, layer_decay=0.75)
        config.epochs = 50.0
    if variant.startswith("locality"):
        _set_locality(config, variant)
    if variant == "adapt":
        # All that is empty or 0 here is derived from the data, the weights and the devices.
        config.model.update(
            size="", patch_size=(), layer_decay=0.75, mixup=0.0, cutmix=0.0, erasing=0.0
        )
        config.data = dict(
            source="",
            split="",
            image_size=(),
            channels=0,
            bits=0,
            mean=(),
            std=(),
            crop_area=(0.3, 1),
        )
        config.batch_size = 0
        config.epochs = 50.0
        config.optimizer.base_lr = 1e-3
        config.log = dict(every_steps=50)
        config.checkpoint = dict(every_steps=500)
        config.evaluate.crop_ratio = 1.0
        config.export = dict(formats=("official", "timm"))
    if variant == "tiny":
        config.model.update(
            size="",
            width=128,
            depth=4,
            heads=4,
            patch_size=(7, 7),
            drop_path=0.0,
            layer_decay=0.75,
            # The paper's mixing and erasing are for a hundred epochs of a million images.
            mixup=0.0,
            cutmix=0.0,
            erasing=0.0,
        )
        config.data = dict(EMBEDDED_DATA, split="", crop_area=(0.7, 1.0))
        config.batch_size = 128
        config.epochs = 20.0
        config.optimizer.base_lr = 2e-3
        config.schedule.warmup_epochs = 2.0
        config.log = dict(every_steps=50)
        config.checkpoint = dict(every_steps=200)
        config.evaluate.crop_ratio = 1.0
    return config


def _vit() -> dict:
    return dict(
        encoder="vit",
        # Of pre-trained ViTs, as in `mim_jax.models.tower.FAMILIES`: "mae" (its heirs as well),
        # "cae", "clip", "dino", ...
        family="mae",
        # "tiny" to "huge", as in `VIT_SIZES`; width, depth, heads override it where > 0.
        size="base",
        width=0,
        depth=0,
        heads=0,
        patch_size=(16, 16),
        # A learned table of relative positions in every block, zero at first (CAE).
        position_bias=False,
        # Factors on the branches of blocks, where the weights have none; 0 for the family's.
        layer_scale=0.0,
        # Bound of the attention logits (encoders of Locality Alignment: 30); 0 for none.
        logit_cap=0.0,
    )


def _conv_vit() -> dict:
    return dict(
        encoder="conv_vit",
        # "base" or "large", as in `CONV_VIT_SIZES`; the three below override it where given.
        size="base",
        # Of the three stages.
        widths=(),
        depths=(),
        heads=0,
        patch_sizes=(4, 2, 2),
        # Of both convolutional stages; `mlp_ratio` is that of the third.
        conv_mlp_ratios=(4.0, 4.0),
        # A learned token before the others, as in the released MR-MCMAE models.
        cls_token=False,
    )


def _set_cae(config: ml_collections.ConfigDict, variant: str) -> None:
    """CAE's and CAE v2's recipes; their learning rates are absolute."""
    config.model.update(family="cae", position_bias=True)
    if not variant.startswith("cae_v2"):
        config.data.update(augment="", color_jitter=(0.4, 0.4, 0.4))
        config.batch_size = 4096
        config.optimizer.lr = 8e-3
        if variant == "cae_l16":
            config.model.update(size="large", drop_path=0.2, layer_decay=0.75)
            config.optimizer.lr = 2e-3
            config.epochs = 50.0
        return
    config.model.layer_decay = 0.75
    config.optimizer.lr = 2e-4
    if variant == "cae_v2_s16":
        config.model.update(size="small", heads=12)
        config.optimizer.lr = 4e-4
        config.epochs = 200.0
        config.schedule.warmup_epochs = 20.0
    if variant == "cae_v2_t16":
        config.model.update(size="tiny", heads=12, layer_decay=0.85)
        config.model.update(drop_path=0.0, mixup=0.2, cutmix=0.0, smoothing=0.0)
        config.data.augment = "rand-m10-mstd0.5-inc1"
        config.optimizer.lr = 4e-3


def _set_locality(config: ml_collections.ConfigDict, variant: str) -> None:
    """Locality Alignment's recipe for CLIP's towers; for one as released, `logit_cap` is 0."""
    config.model.update(family="clip", logit_cap=30.0, pool="block", layer_decay=0.7)
    mean, std = CLIP
    # Beside RandAugment, timm leaves the colour jitter of the recipe (0.3) out.
    config.data.update(mean=mean, std=std)
    config.optimizer.update(lr=3e-4, clip_norm=3.0)
    config.schedule.min_lr = 3e-5
    config.epochs = 50.0
    config.evaluate.crop_ratio = 0.9
    if variant != "locality_b16":
        config.model.update(size="large", patch_size=(14, 14))
    if variant == "locality_l14_336":
        config.data.image_size = (336, 336)
