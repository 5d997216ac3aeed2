"""DMJD pre-training (Ma et al., 2023): the published recipe, on ConvMAE's encoder and on a ViT."""

import ml_collections

from mim_jax.config import EMBEDDED_DATA
from mim_jax.models.tower import tower_settings

VARIANTS = ("convvit_b16_dec2", "convvit_b16", "convvit_l16", "vit_b16", "tiny")
"""The official models on ImageNet-1K with a decoder of 2 blocks, and the published ones with 8
(base and large); a plain ViT with the same masks and losses, for which there is no official code;
and one for a laptop on the embedded images."""

MASK_RATIO, PREDICTION_RATIO = 0.6, 1.0


def get_config(variant: str = "convvit_b16") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    config = ml_collections.ConfigDict(
        dict(
            method="dmjd",
            model=dict(
                **(_vit() if variant in ("vit_b16", "tiny") else _conv_vit()),
                mlp_ratio=4.0,
                # Grid that fixed positions are spread over; () for the model's own.
                position_grid=(),
                decoder_width=512,
                decoder_depth=8,
                decoder_heads=16,
                # The official decoder takes the ratio of the first convolutional stage.
                decoder_mlp_ratio=4.0 if variant in ("vit_b16", "tiny") else 8.0,
                # Share of tokens masked in each of the two views, and in at least one of them.
                mask_ratio=MASK_RATIO,
                prediction_ratio=PREDICTION_RATIO,
                # "block" masks blocks of 2 x 2 tokens (the grid must be even), "rand" single ones.
                mask_type="block",
                # "hog", or "teacher" for the features of a frozen tower.
                target="hog",
                # Side in pixels of the cells of "hog".
                hog_cell_size=8,
                # The tower of "teacher": set its path, and see `mim_jax.models.tower.TOWERS`.
                teacher=tower_settings("clip_b16"),
                # "l2" or "smooth_l1" (with beta 2).
                masked_loss="l2",
                visible_loss="smooth_l1",
                # Weight of the visible tokens' loss.
                theta=1.0,
                # "aligned" compares a visible token with its own target, as the paper describes.
                # "raster" repeats a mistake of the official code, which compares it with that of
                # another token of its view; only useful to reproduce official numbers.
                visible_target_order="aligned",
                # Compile one block and loop over it; saves compile time for deep models.
                scan=False,
                # "none", "dots" or "full": what the backward pass computes again to save memory.
                remat="none",
                # Implementation of jax.nn.dot_product_attention: "", "xla" or "cudnn".
                attention="",
            ),
            data=dict(
                source="tfds:imagenet2012",
                image_size=(224, 224),
                crop_area=(0.5, 1.0),
                workers=8,
            ),
            # Images; the encoder sees two views of each.
            batch_size=512,
            epochs=400.0,
            optimizer=dict(
                # The published rate 6e-4 counts predicted tokens: it grows with their share in an
                # image over that in a view. Change it together with the two ratios.
                base_lr=6e-4 * PREDICTION_RATIO / MASK_RATIO,
                b1=0.9,
                b2=0.95,
                weight_decay=0.05,
            ),
            schedule=dict(warmup_epochs=20.0),
            evaluate=dict(test_split="validation"),
        )
    )
    if variant == "convvit_b16_dec2":
        config.model.decoder_depth = 2
    elif variant == "convvit_l16":
        config.model.size = "large"
        config.optimizer.clip_norm = 3.0
    elif variant == "tiny":
        config.model.update(
            size="",
            width=128,
            depth=4,
            heads=4,
            patch_size=(7, 7),
            decoder_width=64,
            decoder_depth=1,
            decoder_heads=4,
            # With 4 x 4 tokens, blocks of 2 x 2 would leave one or two to choose.
            mask_type="rand",
            hog_cell_size=7,
            teacher=tower_settings("tiny", "tiny"),
        )
        config.data = dict(EMBEDDED_DATA)
        config.batch_size = 128
        config.epochs = 12.0
        config.optimizer.base_lr = 3e-3
        config.schedule.warmup_epochs = 1.0
        config.log = dict(every_steps=50)
        config.checkpoint = dict(every_steps=200)
        config.evaluate = dict(protocols=("knn", "linear"), crop_ratio=1.0)
    return config


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
        conv_mlp_ratios=(8.0, 8.0),
        # "skipped" computes nothing for removed patches in the convolutional stages, "zeroed"
        # computes them all, as the official code does; the result is the same.
        removed="skipped",
    )


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
