"""Fine-tuning a pre-trained ViT as a classifier: the recipes of the official MAE code."""

import ml_collections

VARIANTS = ("vit_b16", "vit_l16", "vit_h14", "adapt", "tiny")
"""The paper's three sizes on ImageNet-1K, one that derives its settings from a folder of labelled
images and the weights to start from, and one that goes on from a run of `mae:tiny`."""


def get_config(variant: str = "vit_b16") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    config = ml_collections.ConfigDict(
        dict(
            method="finetune",
            model=dict(
                # "tiny" to "huge", as in `VIT_SIZES`; width, depth, heads override it where > 0.
                size="base",
                width=0,
                depth=0,
                heads=0,
                mlp_ratio=4.0,
                patch_size=(16, 16),
                position_grid=(),
                # 0 takes the number of the data.
                num_classes=0,
                # "single", "multi" (any number of classes for an image), or "" for the data's.
                labels="",
                # "mean" of the patch tokens with a norm of its own, or "cls" for the class token.
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
        config.data = dict(
            source="embedded",
            split="",
            image_size=(28, 28),
            channels=1,
            mean=(0.2861,),
            std=(0.3530,),
            crop_area=(0.7, 1.0),
        )
        config.batch_size = 128
        config.epochs = 20.0
        config.optimizer.base_lr = 2e-3
        config.schedule.warmup_epochs = 2.0
        config.log = dict(every_steps=50)
        config.checkpoint = dict(every_steps=200)
        config.evaluate.crop_ratio = 1.0
    return config
