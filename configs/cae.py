"""CAE and CAE v2 pre-training (Chen et al., 2023; Zhang et al., 2023): the official recipes."""

import ml_collections

from mim_jax.config import EMBEDDED_DATA
from mim_jax.models.tower import tower_settings

VARIANTS = (
    "vit_b16",
    "vit_b16_800",
    "vit_b16_1600",
    "vit_l16",
    "vit_l16_as_released",
    "v2_t16",
    "v2_s16",
    "v2_b16",
    "pixels_b16",
    "tiny",
)
"""CAE for 300, 800 and 1600 epochs, and large: as intended, and as the released script runs it
(decoder width and heads are lost in it). CAE v2 in three sizes. Pixels as target, which is no part
of the paper. One for a laptop on the embedded images."""

V2_SIZES = {
    # Decoder width, depth of the regressor, masked patches.
    "v2_t16": ("tiny", 96, 1, 30),
    "v2_s16": ("small", 384, 1, 49),
    "v2_b16": ("base", 768, 4, 98),
}


def get_config(variant: str = "vit_b16") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    config = ml_collections.ConfigDict(
        dict(
            method="cae",
            model=dict(
                # "tokens" of the tokenizer, "features" of the teacher (CAE v2), or "pixels".
                target="tokens",
                # "tiny" to "huge", as in `VIT_SIZES`; width, depth, heads override it where > 0.
                # All sizes of CAE but the large one have 12 heads.
                size="base",
                width=0,
                depth=0,
                heads=12,
                mlp_ratio=4.0,
                patch_size=(16, 16),
                # Grid that fixed positions are spread over; () for the model's own.
                position_grid=(),
                # Initial layer scale of the encoder; 0 for none.
                layer_scale=0.1,
                # Rate of stochastic depth in the last block of encoder, regressor and decoder.
                drop_path=0.1,
                regressor_depth=4,
                # Width and heads of regressor and decoder.
                decoder_width=768,
                decoder_depth=4,
                decoder_heads=12,
                # Of regressor and decoder; the regressor's is fixed at one where it is 0.
                decoder_layer_scale=0.1,
                # "block" or "random"; and how many patches are masked, exactly.
                mask="block",
                masked=98,
                # Smallest and largest area of a block in patches; 0 for `masked`.
                min_block=16,
                max_block=0,
                # Weights of both losses; without alignment its branch is not computed.
                target_weight=1.0,
                align_weight=2.0,
                # Pixels only: normalize each patch by its own mean and variance.
                normalize_target=False,
                # DALL-E's encoder: its released pickle, or a file of its state dict. "random"
                # takes one that was never trained.
                tokenizer=dict(
                    path="",
                    hidden=256,
                    blocks_per_group=2,
                    vocabulary=8192,
                    channels=3,
                    compute_dtype="",
                ),
                # What CAE v2 learns from.
                teacher=tower_settings("clip_b16"),
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
                crop_area=(0.08, 1.0),
                # The tokenizer sees 8 x 8 pixels where the encoder sees a patch.
                target_size=(112, 112),
                target_interpolation="lanczos",
                workers=8,
            ),
            batch_size=2048,
            epochs=300.0,
            optimizer=dict(lr=1.5e-3, b1=0.9, b2=0.999, weight_decay=0.05, clip_norm=3.0),
            schedule=dict(warmup_epochs=10.0, min_lr=1e-5),
            evaluate=dict(test_split="validation"),
        )
    )
    model, data = config.model, config.data
    if variant == "vit_b16_800":
        config.epochs, config.schedule.warmup_epochs = 800.0, 20.0
    elif variant == "vit_b16_1600":
        config.epochs, config.schedule.warmup_epochs = 1600.0, 40.0
    elif variant in ("vit_l16", "vit_l16_as_released"):
        config.epochs, config.schedule.warmup_epochs = 1600.0, 40.0
        model.update(size="large", heads=16, layer_scale=1e-5)
        if variant == "vit_l16":
            model.update(decoder_width=1024, decoder_heads=16, decoder_layer_scale=1e-5)
    elif variant in V2_SIZES:
        size, width, depth, masked = V2_SIZES[variant]
        model.update(target="features", size=size, align_weight=0.0, decoder_depth=0)
        model.update(decoder_width=width, regressor_depth=depth, masked=masked)
        # CLIP sees the crop that the encoder sees, so there is no second rendering.
        data.update(crop_area=(0.4, 1.0), color_jitter=(0.4, 0.4, 0.4), target_size=())
    elif variant == "pixels_b16":
        model.update(target="pixels", normalize_target=True)
        data.update(target_size=())
        config.log = dict(pictures_every_steps=5000)
    elif variant == "tiny":
        model.update(
            target="pixels",
            size="",
            width=128,
            depth=4,
            heads=4,
            patch_size=(7, 7),
            drop_path=0.0,
            regressor_depth=2,
            decoder_width=128,
            decoder_depth=1,
            decoder_heads=4,
            masked=8,
            min_block=2,
        )
        config.data = dict(EMBEDDED_DATA)
        config.batch_size = 128
        config.epochs = 13.0
        config.schedule.warmup_epochs = 2.0
        config.log = dict(every_steps=50, pictures_every_steps=200)
        config.checkpoint = dict(every_steps=200)
        # The class token learns only by what patches read from it, slowly: at this length their
        # mean tells more.
        config.evaluate = dict(protocols=("knn", "linear"), pool="mean", crop_ratio=1.0)
    return config
