"""Fine-tuning of TIP on classes of image-table pairs (Du et al., 2024): the official recipe."""

import ml_collections

from mim_jax.methods.parts.table_image import TINY_PAIRS, pair_settings

VARIANTS = ("dvm", "dvm_full", "cardiac", "cardiac_full", "tiny")
"""Car adverts (DVM) and cardiac MR with UK Biobank records: linear probing, and full fine-tuning;
and one that goes on from a run of `tip:tiny`."""


def get_config(variant: str = "dvm") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    config = ml_collections.ConfigDict(
        dict(
            method="tip_classifier",
            model=dict(
                **pair_settings(),
                # 0 takes the number of the data.
                num_classes=0,
                # "frozen" trains the linear layers alone, "trainable" everything.
                finetune="frozen",
                # Average the logits of three linear layers: on both modalities and on either.
                ensemble=False,
                # In training, batch norm goes by the batch and moves, frozen or not.
                moving_statistics=True,
            ),
            data=dict(
                # A CSV or Parquet file that names images. What is missing, by data.table.missing
                # or in the file, is missing in training and evaluation.
                source="",
                image_size=(128, 128),
                mean=(0.0, 0.0, 0.0),
                std=(1.0, 1.0, 1.0),
                crop_area=(0.6, 1.0),
                color_jitter=(0.8, 0.8, 0.8, 0.2),
                flip=False,
                table=dict(corruption=0.3, corrupt_input=True, augment_probability=0.8),
                workers=8,
            ),
            batch_size=256,
            # At most: the paper stops after ten epochs without a better validation score.
            epochs=500.0,
            compute_dtype="float32",
            optimizer=dict(
                name="adam", lr=1e-4, b1=0.9, b2=0.999, weight_decay=0.0, constant_rate=True
            ),
            schedule=dict(warmup_epochs=0.0),
            checkpoint=dict(best_metric="classification/top1"),
            evaluate=dict(every_epochs=1.0, protocols=("classification",), test_split="validation"),
        )
    )
    if variant.endswith("_full"):
        config.model.finetune = "trainable"
    if variant.startswith("cardiac"):
        config.data.color_jitter = (0.5, 0.5, 0.5, 0.2)
        config.data.table.update(
            jitter_probability=0.5, grey_probability=0.0, blur_probability=0.0, rotation=45.0
        )
        config.batch_size = 128
        config.optimizer.lr = 1e-3
        config.checkpoint.best_metric = "classification/auroc"
    if variant == "tiny":
        config.model.update(TINY_PAIRS, finetune="trainable")
        config.data = dict(
            source="synthetic:pairs",
            split="train[:240]",
            image_size=(64, 64),
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            crop_area=(0.6, 1.0),
            # Hues stay what they are, since the class depends on them.
            color_jitter=(0.3, 0.3, 0.3),
            flip=False,
            table=dict(
                corrupt_input=True,
                missing="random_values",
                missing_rate=0.3,
                augment_probability=0.8,
                grey_probability=0.0,
                blur_probability=0.0,
            ),
        )
        config.batch_size = 40
        config.epochs = 30.0
        config.optimizer.lr = 1e-3
        config.log = dict(every_steps=20)
        config.checkpoint = dict(every_steps=100)
        config.evaluate = dict(protocols=("classification",))
    return config
