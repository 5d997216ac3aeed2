"""Hi-End-MAE pre-training on CT volumes (Tang et al., 2026): the recipe of the official code."""

import ml_collections

VARIANTS = ("large_p12", "base_p16", "large_p16", "tiny")
"""The model that was released (patches of 12 voxels), the two with patches of 16, and one for a
laptop on procedural abdomens."""


def get_config(variant: str = "large_p12") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    config = ml_collections.ConfigDict(
        dict(
            method="hi_end_mae",
            model=dict(
                # "tiny" to "huge", as in `VIT_SIZES`; width, depth, heads override it where > 0.
                # Widths of encoder and decoder are multiples of 6.
                size="",
                width=1536,
                depth=12,
                heads=16,
                mlp_ratio=4.0,
                patch_size=(12, 12, 12),
                # "sincos", or "learned_patches" for a parameter in the encoder ("perceptron" of
                # the official code).
                positions="sincos",
                # Grid that fixed positions are spread over; () for the model's own.
                position_grid=(),
                # Blocks of the encoder that the decoder attends to, counted from 0: the paper's
                # figure has the 3rd, 6th and 9th, the released models the 4th, 7th and 10th.
                taps=(3, 6, 9),
                # Without it the decoder sees the encoder's last output alone: a plain MAE.
                cross_attention=True,
                decoder_width=528,
                # Self-attention blocks before those for the taps.
                decoder_depth=2,
                decoder_heads=16,
                mask_ratio=0.75,
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
            ),
            # Crops; four devices with 24 volumes and 8 crops of each.
            batch_size=768,
            epochs=1000.0,
            # Official: weight decay on everything. decay_all=False spares biases, norms, tokens.
            optimizer=dict(lr=1e-4, b1=0.9, b2=0.95, weight_decay=0.05, decay_all=True),
            schedule=dict(warmup_epochs=10.0),
            log=dict(pictures_every_steps=1000),
        )
    )
    if variant.endswith("p16"):
        config.model.patch_size = (16, 16, 16)
    if variant == "base_p16":
        config.model.update(width=768, heads=12, decoder_width=384, decoder_heads=12)
    elif variant == "tiny":
        config.model.update(
            width=60,
            depth=6,
            heads=4,
            patch_size=(6, 6, 6),
            taps=(1, 3, 4),
            decoder_width=48,
            decoder_depth=1,
            decoder_heads=4,
        )
        # As large as the volumes: one crop of each.
        config.data.update(source="synthetic:abdomens", image_size=(24, 24, 24), workers=0)
        config.data.volume = dict(views=1)
        config.batch_size = 16
        config.epochs = 20.0
        config.optimizer.lr = 1e-3
        config.schedule.warmup_epochs = 2.0
        config.log.pictures_every_steps = 100
        config.checkpoint = dict(every_steps=100)
    return config
