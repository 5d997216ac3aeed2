"""MR-MAE pre-training (Gao et al., 2023) with its arms, and ConvMAE and FastConvMAE (2022)."""

import ml_collections

from mim_jax.config import EMBEDDED_DATA
from mim_jax.models.tower import tower_settings

VARIANTS = (
    "vit_b16",
    "vit_b16_dino",
    "mcmae_b16",
    "reconstruct_only",
    "mimic_only",
    "convmae_b16",
    "fastconvmae_b16",
    "tiny",
)
"""MR-MAE on ImageNet-1K with CLIP and with DINO as teacher, and on ConvMAE's encoder (MR-MCMAE);
the other two arms of the paper's comparison, on the ViT; ConvMAE and FastConvMAE, which have no
teacher; and one for a laptop on the embedded images."""


def get_config(variant: str = "vit_b16") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    hybrid = variant in ("mcmae_b16", "convmae_b16", "fastconvmae_b16")
    config = ml_collections.ConfigDict(
        dict(
            method="mr_mae",
            model=dict(
                **(_conv_vit() if hybrid else _vit()),
                mlp_ratio=4.0,
                # Grid that fixed positions are spread over; () for the model's own.
                position_grid=(),
                # Predict the pixels of removed patches.
                reconstruct=True,
                decoder_width=512,
                decoder_depth=8,
                decoder_heads=16,
                mask_ratio=0.75,
                normalize_target=True,
                # Complementary masks of each image that together show every patch once; needs
                # mask_ratio 1 - 1 / views. 1 for a single random mask.
                views=1,
                # Weight of the loss on visible patches; 0 for none.
                mimic_weight=1.0,
                # "last": the head reads the encoder's output. "quarters": also the last blocks of
                # the earlier quarters of the depth.
                mimic_layers="last",
                # The frozen tower to mimic: set its path, and see `mim_jax.models.tower.TOWERS`.
                teacher=tower_settings("clip_b16"),
                # "hidden", the last block's output; or "projected", CLIP's space shared with text.
                teacher_output="hidden",
                # "whiten" (mean 0, variance 1 in every token) or "none".
                target_norm="whiten",
                # Visible patches are drawn at "random", or by the teacher's class "attention".
                mask_type="random",
                # In proportion to the "attention" itself, or to its "softmax".
                focus_p="attention",
                # Compile one block and loop over it; saves compile time for deep models.
                scan=False,
                # "none", "dots" or "full": what the backward pass computes again to save memory.
                remat="none",
                # Implementation of jax.nn.dot_product_attention: "", "xla" or "cudnn".
                attention="",
            ),
            data=dict(source="tfds:imagenet2012", image_size=(224, 224), workers=8),
            # The paper's batch and warm-up are not known; rate and decay are ConvMAE's.
            batch_size=1024,
            epochs=400.0,
            optimizer=dict(base_lr=1.5e-4, b1=0.9, b2=0.95, weight_decay=0.05),
            schedule=dict(warmup_epochs=40.0),
            log=dict(pictures_every_steps=5000),
            evaluate=dict(test_split="validation"),
        )
    )
    if variant == "vit_b16_dino":
        config.model.teacher = tower_settings("dino_b16")
    elif variant == "reconstruct_only":
        config.model.mimic_weight = 0.0
    elif variant == "mimic_only":
        config.model.reconstruct = False
    elif variant == "convmae_b16":
        config.model.mimic_weight = 0.0
        config.batch_size = 2048
        config.epochs = 1600.0
    elif variant == "fastconvmae_b16":
        config.model.mimic_weight = 0.0
        config.model.views = 4
        config.batch_size = 512
        config.epochs = 50.0
        config.optimizer.base_lr = 6e-4
        config.schedule.warmup_epochs = 10.0
    elif variant == "tiny":
        config.model.update(
            size="",
            width=128,
            depth=4,
            heads=4,
            patch_size=(7, 7),
            decoder_width=48,
            decoder_depth=1,
            decoder_heads=4,
            # Many patches of these small pictures are flat; normalized, they would be all noise.
            normalize_target=False,
            teacher=tower_settings("tiny", "tiny"),
        )
        config.data = dict(EMBEDDED_DATA)
        config.batch_size = 128
        config.epochs = 20.0
        config.optimizer.base_lr = 3e-3
        config.schedule.warmup_epochs = 2.0
        config.log = dict(every_steps=50, pictures_every_steps=200)
        config.checkpoint = dict(every_steps=200)
        config.evaluate = dict(protocols=("knn", "linear"), crop_ratio=1.0)
    return config


def _vit() -> dict:
    return dict(
        encoder="vit",
        # "tiny" to "huge", as in `VIT_SIZES`; width, depth, heads override it where > 0.
        size="base",
        width=0,
        depth=0,
        heads=0,
        patch_size=(16, 16),
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
        # A learned token before the visible ones, as in the released MR-MCMAE models.
        cls_token=False,
        # What the convolutional stages do with removed patches: "skipped" computes nothing for
        # them; "zeroed" computes all, as the official code does, with the same result; "seen"
        # leaks them (an ablation).
        removed="skipped",
    )
