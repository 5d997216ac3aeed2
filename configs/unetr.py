"""Fine-tuning for segmentation of volumes by UNETR: the recipe of Hi-End-MAE (Tang et al., 2026).

It starts from a run of `hi_end_mae` or from the file that its authors released, by `init_from`.
"""

import ml_collections

VARIANTS = ("large_p12", "base_p16", "tiny")
"""Encoders of the released model and of the smaller one, with the classes of BTCV; one for a laptop
that goes on from a run of `hi_end_mae:tiny`, on procedural abdomens."""


def get_config(variant: str = "large_p12") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    config = ml_collections.ConfigDict(
        dict(
            method="unetr",
            model=dict(
                # "tiny" to "huge", as in `VIT_SIZES`; width, depth, heads override it where > 0.
                size="",
                width=1536,
                depth=12,
                heads=16,
                mlp_ratio=4.0,
                patch_size=(12, 12, 12),
                # A parameter, which starts from the table of pre-training; or "sincos".
                positions="learned_patches",
                # Grid that fixed positions are spread over; () for the model's own.
                position_grid=(),
                # Three blocks of the encoder that the decoder sees, counted from 0.
                taps=(3, 6, 9),
                # Channels of the finest maps.
                feature_size=32,
                # With the background: 13 organs and it (BTCV).
                num_classes=14,
                # Compile one block and loop over it; saves compile time for deep models.
                scan=False,
                # "none", "dots" or "full": what the backward pass computes again to save memory.
                remat="none",
                # Implementation of jax.nn.dot_product_attention: "", "xla" or "cudnn".
                attention="",
            ),
            data=dict(
                source="",
                image_size=(96, 96, 96),
                channels=1,
                bits=16,
                mean=(0.0,),
                std=(1.0,),
                flip=False,
                workers=8,
                volume=dict(
                    views=4,
                    foreground=0.5,
                    centre="segmentation",
                    flip=0.2,
                    rotate=0.2,
                ),
            ),
            # Crops: four of one volume.
            batch_size=4,
            epochs=500.0,
            optimizer=dict(lr=1e-4, b1=0.9, b2=0.999, weight_decay=1e-5, decay_all=True),
            schedule=dict(warmup_epochs=50.0),
            log=dict(pictures_every_steps=1000),
            evaluate=dict(protocols=("dice",)),
        )
    )
    if variant == "base_p16":
        config.model.update(width=768, heads=12, patch_size=(16, 16, 16))
    elif variant == "tiny":
        config.model.update(
            width=60,
            depth=6,
            heads=4,
            patch_size=(6, 6, 6),
            taps=(1, 3, 4),
            feature_size=8,
            num_classes=5,
        )
        # As large as the volumes: one crop of each. Organs have their places, so nothing is turned.
        config.data.update(source="synthetic:abdomens", image_size=(24, 24, 24), workers=0)
        config.data.volume.update(views=1, flip=0.0, rotate=0.0)
        config.batch_size = 8
        config.epochs = 5.0
        config.optimizer.lr = 1e-3
        config.schedule.warmup_epochs = 1.0
        config.log.pictures_every_steps = 100
        config.checkpoint = dict(every_steps=100)
    return config
