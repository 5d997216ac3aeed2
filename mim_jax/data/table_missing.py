"""Protocols that take cells out of a table: how TIP is tested with incomplete data (section 9)."""

from collections.abc import Callable

import numpy as np

from mim_jax.data.sources import Source, open_source
from mim_jax.data.splits import SPLIT_SPELLINGS
from mim_jax.data.table import TableSource

PROTOCOLS = ("none", "random_values", "random_columns", "most_important", "least_important")
"""TIP's RVM, RFM, MIFM and LIFM, in this order after "none"."""

VALUE_SEEDS = dict(zip(SPLIT_SPELLINGS, (2021, 2022, 2023)))
"""Seeds of missing values by split."""

COLUMN_SEED = 2022
"""Seed of missing columns, which are the same in all splits, and of the forest."""


def with_missing(
    source: TableSource,
    protocol: str,
    rate: float,
    train: Callable[[], Source] | None = None,
) -> TableSource:
    """A source in which cells are missing, beside those that already are.

    random_values: exactly `int(rows * columns * rate)` cells of the table, drawn without
        replacement, others in every split.
    random_columns: `int(columns * rate)` random columns, the same in all splits.
    most_important, least_important: so many columns, the first or last by `column_importance`.

    Args:
        source: a table.
        protocol: one of `PROTOCOLS`.
        rate: share of the cells or columns, in [0, 1].
        train: opens the labelled training data, by which columns are ranked; None if `source` is
            these data.

    Raises:
        ValueError: an unknown protocol, a rate out of range, a split that has no seed, or training
            data that are no table or have no labels.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"missing is {protocol!r}; known are {', '.join(PROTOCOLS)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"missing_rate must be in [0, 1], got {rate}")
    if protocol == "none":
        return source
    rows, columns = source.table.shape
    cells = np.zeros((rows, columns), bool)
    if protocol == "random_values":
        random = np.random.RandomState(_value_seed(source))
        drawn = random.choice(rows * columns, int(rows * columns * rate), replace=False)
        cells.flat[drawn] = True
    else:
        if protocol == "random_columns":
            ranked = np.random.RandomState(COLUMN_SEED).permutation(columns)
        else:
            ranked = np.argsort(-column_importance(train() if train else source), kind="stable")
            ranked = ranked if protocol == "most_important" else ranked[::-1]
        cells[:, ranked[: int(columns * rate)]] = True
    return source.without(cells, f"{source.name}, {protocol} missing {rate:g}")


def column_importance(train: Source) -> np.ndarray:
    """The importance of each column for the label, float64 `[columns]`, in a random forest.

    Missing cells enter as the value 0. The importances add up to 1.

    Raises:
        ValueError: no table, or one without labels.
    """
    from sklearn.ensemble import RandomForestClassifier

    if not isinstance(train, TableSource) or train.labels is None:
        raise ValueError(
            f"{train.name} is no table with labels, by which columns can be ranked; choose "
            "'random_values' or 'random_columns', or labelled training data"
        )
    forest = RandomForestClassifier(random_state=COLUMN_SEED).fit(train.table, train.labels)
    return forest.feature_importances_


def open_with_missing(
    name: str,
    split: str,
    train_split: str,
    protocol: str,
    rate: float,
    *,
    channels: int | None = None,
    bits: int = 8,
    backend: str = "auto",
) -> Source:
    """`open_source`, with cells taken out if the source is a table; other sources as they are.

    Args:
        name: of the data.
        split: to open.
        train_split: the labelled data by which columns are ranked.
        protocol: one of `PROTOCOLS`.
        rate: see `with_missing`.
        channels: see `open_source`.
        bits: see `open_source`.
        backend: see `open_source`.

    Raises:
        ValueError: see `open_source` and `with_missing`.
        FileNotFoundError: see `open_source`.
    """

    def opened(which: str) -> Source:
        return open_source(name, which, channels=channels, bits=bits, backend=backend)

    source = opened(split)
    if not isinstance(source, TableSource):
        return source
    return with_missing(source, protocol, rate, lambda: opened(train_split))


def _value_seed(source: TableSource) -> int:
    for spellings, seed in VALUE_SEEDS.items():
        if source.split in spellings:
            return seed
    if source.split == "all":
        return VALUE_SEEDS[SPLIT_SPELLINGS[0]]
    raise ValueError(
        f"{source.name}: the split {source.split!r} has no seed for missing values; known are "
        f"{', '.join(name for spellings in SPLIT_SPELLINGS for name in spellings)}"
    )
