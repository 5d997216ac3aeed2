"""Vec2Face (Wu et al., 2025): the authors' recipe of 2025, and that of the published numbers."""

import ml_collections

VARIANTS = ("base", "large", "huge", "base_2024", "tiny")
"""Three sizes under the current recipe; the recipe of late 2024, which the released weights come
from; one for a laptop on drawn faces."""

STEPS_PER_EPOCH = 1_022_444 // 128
"""Of the authors' 50 000 identities of WebFace4M at their batch size."""


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    config = ml_collections.ConfigDict(
        dict(
            method="vec2face",
            model=dict(
                # "base", "large" or "huge"; width, depth, heads override it where > 0.
                size="base",
                width=0,
                depth=0,
                heads=0,
                mlp_ratio=4.0,
                # The decoder of tokens has the width of their encoder.
                decoder_depth=8,
                decoder_heads=16,
                # On embeddings, attention weights and all linear layers of the blocks.
                dropout=0.1,
                # Smallest and largest share of masked tokens; mean and deviation of the normal
                # distribution that is truncated to them. As many as the smallest are dropped.
                mask_rate=(0.5, 1.0, 0.75, 0.25),
                # The same where images are generated.
                generation_mask=(0.1, 1.0, 0.15, 0.25),
                # Decoder from tokens to the image: channels it sees; channels at each level, that
                # of the full resolution first, each the double of the next one's; blocks at each;
                # groups of GroupNorm.
                image_decoder_inputs=256,
                image_decoder_widths=(128, 128, 256, 256, 512),
                image_decoder_blocks=2,
                image_decoder_groups=32,
                # Blocks that change the width have no skip around them, as in the official code;
                # the released weights need it. False is the block of VQGAN.
                official_shortcut=True,
                # Discriminator of patches: channels of stem and stages, groups of GroupNorm.
                discriminator_widths=(64, 128, 256, 512),
                discriminator_groups=8,
                # Step at which the adversarial terms set in: after 80 of 100 epochs.
                discriminator_start=80 * STEPS_PER_EPOCH,
                # Let the generator's adversarial term into the discriminator's gradient too, as
                # the official loop does.
                leak_generator_gradient=False,
                # Weights of the terms beside the pixels' squared error; `perceptual` is that of
                # twice LPIPS. Without `perceptual` or `adversarial`, their networks are left away.
                loss_weights=dict(
                    perceptual=0.1,
                    structure=0.1,
                    tokens=1.0,
                    identity=1.0,
                    adversarial=1.0,
                    # Times the ratio of gradient norms at the last convolution (VQGAN).
                    adaptive=False,
                ),
                # The face model, which gives the vectors: weights in InsightFace's names, or
                # "tiny" of the package; blocks override `size` where given.
                face_model=dict(
                    path="",
                    size="iresnet100",
                    blocks=(),
                    widths=(64, 128, 256, 512),
                    outputs=512,
                ),
                # LPIPS: a file of its whole state dict, or a folder with VGG16 and its heads.
                perceptual_path="",
                # Compile one block and loop over it; saves compile time for deep models.
                scan=False,
                # "none", "dots" or "full": what the backward pass computes again to save memory.
                remat="none",
                # Implementation of jax.nn.dot_product_attention: "", "xla" or "cudnn".
                attention="",
            ),
            data=dict(
                source="folder:webface4m",
                image_size=(112, 112),
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
                # The authors' images are aligned, and used as they are.
                crop_area=(1.0, 1.0),
                crop_aspect=(1.0, 1.0),
                flip=False,
                workers=8,
            ),
            batch_size=128,
            epochs=100.0,
            optimizer=dict(
                # The authors divide by 112 where others divide by 256.
                base_lr=4e-5 * 256 / 112,
                b1=0.9,
                b2=0.99,
                weight_decay=0.01,
                decay_all=True,
                clip_norm=2.0,
            ),
            schedule=dict(warmup_epochs=5.0),
            log=dict(pictures_every_steps=5000),
            evaluate=dict(crop_ratio=1.0),
        )
    )
    model = config.model
    if variant in ("large", "huge"):
        model.size = variant
    elif variant == "base_2024":
        # The first readme's command; that of November 2024 has 800 epochs and no adversarial
        # terms at all, since they would begin after 1000.
        config.epochs = 2000.0
        model.discriminator_start = 1000 * STEPS_PER_EPOCH
        model.loss_weights.update(perceptual=1.0, structure=1.0, adversarial=0.8, adaptive=True)
        config.optimizer.clip_norm = 0.0
    elif variant == "tiny":
        model.update(
            size="",
            width=64,
            depth=2,
            heads=4,
            decoder_depth=2,
            decoder_heads=4,
            image_decoder_inputs=32,
            image_decoder_widths=(16, 32, 32),
            image_decoder_blocks=1,
            image_decoder_groups=8,
            official_shortcut=False,
            discriminator_widths=(16, 32, 32),
            discriminator_start=500,
        )
        model.face_model.update(
            path="tiny", size="", blocks=(1, 1, 1), widths=(16, 32, 64), outputs=64
        )
        model.loss_weights.update(perceptual=0.0, adversarial=0.01)
        config.data = dict(
            source="synthetic:faces",
            image_size=(28, 28),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            crop_area=(1.0, 1.0),
            crop_aspect=(1.0, 1.0),
            flip=False,
        )
        config.batch_size = 64
        config.epochs = 8.0
        config.optimizer.update(base_lr=0.0, lr=1e-3)
        config.schedule.warmup_epochs = 0.5
        config.log = dict(every_steps=50, pictures_every_steps=200)
        config.checkpoint = dict(every_steps=200)
        # Nobody is in both splits, so that no classifier could name the people of the other.
        config.evaluate = dict(protocols=("verification",), crop_ratio=1.0)
    return config
