"""MAE pre-training (He et al., 2022): the recipe of the official code, section by section."""

import ml_collections

from mim_jax.config import EMBEDDED_DATA

VARIANTS = ("vit_b16", "vit_l16", "vit_h14", "adapt", "tiny")
"""The paper's three sizes on ImageNet-1K, one that derives its settings from a folder of images,
and one for a laptop on the embedded images."""


def get_config(variant: str = "vit_b16") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    config = ml_collections.ConfigDict(
        dict(
            method="mae",
            model=dict(
                # "tiny" to "huge", as in `VIT_SIZES`; width, depth, heads override it where > 0.
                size="base",
                width=0,
                depth=0,
                heads=0,
                mlp_ratio=4.0,
                patch_size=(16, 16),
                # Grid that fixed positions are spread over; () for the model's own. Set from the
                # weights that a run starts from, if they were trained on another one.
                position_grid=(),
                decoder_width=512,
                decoder_depth=8,
                decoder_heads=16,
                mask_ratio=0.75,
                normalize_target=True,
                # Compile one block and loop over it; saves compile time for deep models.
                scan=False,
                # "none", "dots" or "full": what the backward pass computes again to save memory.
                remat="none",
                # Implementation of jax.nn.dot_product_attention: "", "xla" or "cudnn".
                attention="",
            ),
            data=dict(source="tfds:imagenet2012", image_size=(224, 224), workers=8),
            batch_size=4096,
            epochs=800.0,
            optimizer=dict(base_lr=1.5e-4, b1=0.9, b2=0.95, weight_decay=0.05),
            schedule=dict(warmup_epochs=40.0),
            log=dict(pictures_every_steps=5000),
            evaluate=dict(test_split="validation"),
        )
    )
    if variant == "vit_l16":
        config.model.size = "large"
    elif variant == "vit_h14":
        config.model.size = "huge"
        config.model.patch_size = (14, 14)
    elif variant == "adapt":
        # All that is empty or 0 here is derived from the data, the weights and the devices.
        config.model.update(
            size="", patch_size=(), decoder_width=0, decoder_depth=0, decoder_heads=0
        )
        config.data = dict(source="", image_size=(), channels=0, bits=0, mean=(), std=(), workers=0)
        config.batch_size = 0
        config.epochs = 0.0
        config.optimizer.base_lr = 0.0
        config.schedule.warmup_epochs = -1.0
        config.log = dict(every_steps=50, pictures_every_steps=1000)
        config.checkpoint = dict(every_steps=500)
        config.evaluate = dict(protocols=("auto",), train_split="", test_split="", crop_ratio=1.0)
        config.export = dict(formats=("official", "hf-vit"))
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
        )
        config.data = dict(EMBEDDED_DATA)
        config.batch_size = 128
        config.epochs = 30.0
        config.optimizer.base_lr = 3e-3
        config.schedule.warmup_epochs = 2.0
        config.log = dict(every_steps=50, pictures_every_steps=200)
        config.checkpoint = dict(every_steps=200)
        config.evaluate = dict(protocols=("knn", "linear"), crop_ratio=1.0)
        # Float32 on CPU. JAX 0.8 to 0.12 and a mesh of eight differ by at most 2e-5 up to step 300;
        # OpenCV without IPP, as on ARM, rounds pixels otherwise: 8e-5 at step 1, 2e-3 at step 300.
        config.reference = dict(
            steps=(1, 50, 100, 200, 300),
            loss=(2.001646, 0.863113, 0.685173, 0.499289, 0.490856),
            band=(5e-4, 1e-3, 1e-3, 2e-3, 6e-3),
        )
    return config
