"""MaskAlign pre-training (Xue et al., 2023): the published recipe of the official code."""

import ml_collections

from mim_jax.config import EMBEDDED_DATA
from mim_jax.models.tower import tower_settings

VARIANTS = ("vit_b16", "vit_l16", "vit_l16_from_b16", "vit_b16_dino", "tiny")
"""The published students on ImageNet-1K: base from CLIP-B/16, large from CLIP-L/14 at 196 pixels
and from CLIP-B/16; base from DINO-B/16; and one for a laptop on the embedded images. The ablations
are fields: mask_type, fusion, head, target_norm, loss, loss_weights, mask_ratio, drop_path."""


def get_config(variant: str = "vit_b16") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    config = ml_collections.ConfigDict(
        dict(
            method="maskalign",
            model=dict(
                # "tiny" to "huge", as in `VIT_SIZES`; width, depth, heads override it where > 0.
                size="base",
                width=0,
                depth=0,
                heads=0,
                mlp_ratio=4.0,
                patch_size=(16, 16),
                # Grid that fixed positions are spread over; () for the model's own.
                position_grid=(),
                # Rate of stochastic depth in the last block.
                drop_path=0.1,
                # The frozen tower to align with: set its path, and see
                # `mim_jax.models.tower.TOWERS`. Its grid of patches must be the student's.
                teacher=tower_settings("clip_b16"),
                mask_ratio=0.7,
                # Visible patches are drawn by the teacher's class "attention", or at "random".
                mask_type="attention",
                # "simple" aligns layer i with layer i; "linear" mixes layers, starting near that;
                # "sum" mixes any number of layers, starting from their mean.
                fusion="linear",
                # Adaptors: "linear", "norm_linear", "mlp" or "mlp2".
                head="linear",
                # Of the teacher's features: "none", "l2", "whiten" or "bn".
                target_norm="whiten",
                # "smoothl1", "l2" or "l1".
                loss="smoothl1",
                # "mean", "out", "linear_decay", "topK" or "midK", such as "top5".
                loss_weights="top5",
                # Compile one block and loop over it; saves compile time for deep models.
                scan=False,
                # "none", "dots" or "full": what the backward pass computes again to save memory.
                remat="none",
                # Implementation of jax.nn.dot_product_attention: "", "xla" or "cudnn".
                attention="",
            ),
            data=dict(source="tfds:imagenet2012", image_size=(224, 224), workers=8),
            batch_size=1024,
            epochs=200.0,
            optimizer=dict(base_lr=1.5e-4, b1=0.9, b2=0.95, weight_decay=0.05),
            schedule=dict(warmup_epochs=20.0, min_lr=1e-5),
            log=dict(pictures_every_steps=5000),
            evaluate=dict(test_split="validation"),
        )
    )
    if variant in ("vit_l16", "vit_l16_from_b16"):
        config.model.size = "large"
        config.model.drop_path = 0.2
    if variant == "vit_l16":
        # 14 x 14 patches of 14 pixels, as the student has of 16.
        config.model.teacher = tower_settings("clip_l14", image_size=196)
    elif variant == "vit_l16_from_b16":
        config.model.fusion = "sum"
    elif variant == "vit_b16_dino":
        config.model.teacher = tower_settings("dino_b16")
    elif variant == "tiny":
        config.model.update(
            size="",
            width=128,
            depth=4,
            heads=4,
            patch_size=(7, 7),
            drop_path=0.0,
            teacher=tower_settings("tiny", "tiny"),
            loss_weights="top2",
        )
        config.data = dict(EMBEDDED_DATA)
        config.batch_size = 128
        config.epochs = 20.0
        config.optimizer.base_lr = 3e-3
        config.schedule.update(warmup_epochs=2.0, min_lr=0.0)
        config.log = dict(every_steps=50, pictures_every_steps=200)
        config.checkpoint = dict(every_steps=200)
        config.evaluate = dict(protocols=("knn", "linear"), crop_ratio=1.0)
    return config
