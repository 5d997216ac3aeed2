"""TIP pre-training on pairs of an image and a table row (Du et al., 2024): the official recipe."""

import ml_collections

from mim_jax.methods.parts.table_image import TINY_PAIRS, pair_settings

VARIANTS = ("dvm", "cardiac", "dvm_resnet18", "dvm_vit_s", "dvm_vit_b", "tiny")
"""Car adverts (DVM) and cardiac MR with UK Biobank records, both with a ResNet-50; the other image
encoders of the official code; and procedural pairs for a laptop."""

VITS = {"dvm_vit_s": "small", "dvm_vit_b": "base"}
"""Sizes of variants with a ViT."""


def get_config(variant: str = "dvm") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    config = ml_collections.ConfigDict(
        dict(
            method="tip",
            model=dict(
                **pair_settings(VITS.get(variant, "")),
                # Width of the space in which images and tables are compared.
                projection=128,
                temperature=0.1,
                # Of the contrastive loss, what the direction from image to table has.
                image_share=0.5,
                # Share of the cells of a row that are masked and reconstructed.
                mask_ratio=0.5,
                # Some of "itc" (contrast), "itm" (matching) and "mtr" (reconstruction).
                objectives=("itc", "itm", "mtr"),
            ),
            data=dict(
                # A CSV or Parquet file that names images; columns must not have missing values.
                source="",
                image_size=(128, 128),
                # Pixels in [0, 1] are not normalized further.
                mean=(0.0, 0.0, 0.0),
                std=(1.0, 1.0, 1.0),
                crop_area=(0.08, 1.0),
                color_jitter=(0.8, 0.8, 0.8, 0.2),
                # The views flip by themselves, where they are augmented at all.
                flip=False,
                table=dict(corruption=0.3, augment_probability=0.95),
                workers=8,
            ),
            batch_size=256,
            epochs=500.0,
            compute_dtype="float32",
            optimizer=dict(
                name="adam", lr=3e-4, b1=0.9, b2=0.999, weight_decay=1.5e-6, decay_all=True
            ),
            schedule=dict(warmup_epochs=10.0, by_epoch=True),
            log=dict(pictures_every_steps=5000),
        )
    )
    if variant == "cardiac":
        config.data.update(crop_area=(0.2, 1.0), color_jitter=(0.5, 0.5, 0.5, 0.2))
        config.data.table.update(
            jitter_probability=0.5, grey_probability=0.0, blur_probability=0.0, rotation=45.0
        )
        config.batch_size = 128
        config.optimizer.weight_decay = 1e-4
    if variant == "dvm_resnet18":
        config.model.encoder = "resnet18"
    if variant == "tiny":
        config.model.update(TINY_PAIRS)
        config.data = dict(
            source="synthetic:pairs",
            image_size=(64, 64),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            crop_area=(0.5, 1.0),
            # Hues stay what they are, since the table tells them.
            color_jitter=(0.3, 0.3, 0.3),
            flip=False,
            table=dict(grey_probability=0.0, blur_probability=0.0),
        )
        config.batch_size = 64
        config.epochs = 12.0
        config.optimizer.lr = 1e-3
        config.schedule.update(warmup_epochs=1.0, by_epoch=False)
        config.log = dict(every_steps=25, pictures_every_steps=100)
        config.checkpoint = dict(every_steps=100)
        config.evaluate = dict(protocols=("knn", "linear"), train_split="train", test_split="test")
    return config
