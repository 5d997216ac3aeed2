"""The data that a config names."""

import ml_collections

from mim_jax.data.domains import domains_of
from mim_jax.data.sources import Source
from mim_jax.data.table_missing import open_with_missing


def training_source(config: ml_collections.ConfigDict) -> Source:
    """The data that a config trains on; as domains if its batches are made of them."""
    data = config.data
    source = _open(config, data.source, data.split, data.split)
    return domains_of(source, data.source) if data.batches == "domains" else source


def evaluation_source(config: ml_collections.ConfigDict, split: str) -> Source:
    """The data that a config evaluates on: `evaluate.source`, or else those of training.

    Args:
        config: a complete config.
        split: such as `config.evaluate.test_split`.
    """
    settings = config.evaluate
    if settings.source:
        return _open(config, settings.source, split, settings.train_split)
    # Columns are ranked by the data of training, so that the same are missing there and here.
    return _open(config, config.data.source, split, config.data.split)


def _open(config: ml_collections.ConfigDict, name: str, split: str, train_split: str) -> Source:
    data = config.data
    return open_with_missing(
        name,
        split,
        train_split,
        data.table.missing,
        data.table.missing_rate,
        channels=data.channels,
        bits=data.bits,
        backend=data.backend,
    )
