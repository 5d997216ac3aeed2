"""Domains: labelled sources of real and fake images side by side, and batches balanced over them.

A domain is one source of a mixture, known by the name that the mixture calls it by; its number is
its place in the mixture. Its classes are told by their names, in upper or lower case: `real` or `0`
and `fake` or `1`, each perhaps with more behind `-`, `_`, `.`, `/` or a space, such as
`fake_face-swap`. Classes without names are 0 (real) and 1 (fake).
"""

import functools
import logging
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from mim_jax.data.mixture import Member, MixtureSource, members_of
from mim_jax.data.order import Rows, batch_indices, hashed
from mim_jax.data.records import Record, record_of
from mim_jax.data.segmentation import segmentation_of

if TYPE_CHECKING:
    from mim_jax.data.pipeline import OrderOf
    from mim_jax.data.sources import Source

REAL, FAKE = 0, 1
"""The labels."""

CLASS_NAMES = ("real", "fake")
"""In the order of the labels."""

UNSEEN = -1
"""Number of a domain that was not trained on."""

_CLASSES = len(CLASS_NAMES)
_CLASS = re.compile(r"(real|fake|0|1)([-_./ ].*)?", re.IGNORECASE)
_LABELS = {"real": REAL, "0": REAL, "fake": FAKE, "1": FAKE}
_GROUPS, _DRAWS = 1, 2  # what a number is hashed for

_log = logging.getLogger(__name__)


class DomainSource:
    """Several domains one after another, in each first the real examples and then the fake ones.

    An example also has its `domain`, an int.

    Attributes: as for `Source`, and
        names: of the domains, in the order of their numbers.
        shares: how often each is drawn for a batch; only their proportion counts.
        starts: of the groups of one domain and class, int64 `[2 * domains + 1]`: the examples of
            class c of domain d begin at `starts[2 * d + c]`, and the next group's follow.
    """

    num_classes: int | None = _CLASSES
    class_names: tuple[str, ...] | None = CLASS_NAMES
    multi_label = False

    def __init__(
        self,
        name: str,
        sources: Sequence["Source"],
        names: Sequence[str],
        shares: Sequence[Fraction] | None = None,
    ) -> None:
        """Join domains.

        Args:
            name: for messages.
            sources: one for each domain.
            names: of the domains, all different.
            shares: positive, of each domain; equal if not given.

        Raises:
            ValueError: two domains of one name, or one without labels, without examples of both
                classes, or with classes that are neither real nor fake.
        """
        self.name = name
        self.names = tuple(names)
        self.shares = tuple(shares or [Fraction(1)] * len(sources))
        self.kind = getattr(sources[0], "kind", "image")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"{name}: each domain must have a name of its own, got {self.names}")
        self._sources = tuple(sources)
        counts, places = [], []
        for domain, source in zip(self.names, sources, strict=True):
            labels = binary_labels(domain, source)
            counts.append(_counts(domain, labels))
            places.append(np.argsort(labels, kind="stable"))
        self._places = np.concatenate(places)  # in its source, of every example
        self.starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the example with its `label`, 0 real or 1 fake, and the number of its `domain`."""
        domain, label, place = self.place(index)
        return {**self._sources[domain][place], "label": label, "domain": domain}

    def record(self, index: int) -> Record | None:
        """Return the example with its image undecoded; None if its source holds no files."""
        domain, label, place = self.place(index)
        record = record_of(self._sources[domain], place)
        return None if record is None else {**record, "label": label, "domain": domain}

    def segmentation(self, index: int) -> np.ndarray | None:
        """Return the class of every pixel of one example; None if its source does not know."""
        domain, _, place = self.place(index)
        return segmentation_of(self._sources[domain], place)

    def place(self, index: int) -> tuple[int, int, int]:
        """Return domain and label of an example, and its index in the source of its domain."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples, none with index {index}")
        domain, label = divmod(self.group(index), _CLASSES)
        return domain, label, int(self._places[index])

    def group(self, index: int) -> int:
        """Return `2 * domain + label` of an example."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    @property
    def labels(self) -> np.ndarray:
        """The labels of all examples, int32 `[n]`."""
        groups = np.arange(len(self.starts) - 1, dtype=np.int32)
        return np.repeat(groups % _CLASSES, np.diff(self.starts))


class DomainOrder:
    """Batches of one block for each of a few domains, half real and half fake.

    For step s, that many different domains are drawn from (seed, s): one after another, each with
    the share that it has among those that are left. The blocks lie in the order in which their
    domains were drawn, in each first the real rows, then the fake ones. The examples of one domain
    and class are walked in one permutation after another, from which each step takes the next
    rows, whether its domain is drawn or not: so the order needs no state, and over the
    permutations every example comes. No example comes twice in a batch.

    An epoch has as many rows as the domains have examples together; as the classes and domains
    are balanced, examples of small groups come more often in it, those of large ones less.
    """

    def __init__(
        self,
        source: "Source",
        batch_size: int,
        seed: int,
        *,
        domains_per_batch: int,
        accumulate: int = 1,
    ) -> None:
        """Order the examples of domains.

        Args:
            source: a `DomainSource`.
            batch_size: examples per step over all processes.
            seed: of the run.
            domains_per_batch: number of blocks.
            accumulate: micro-batches, which take every `accumulate`-th row, and so have the same
                blocks as the batch.

        Raises:
            ValueError: another source, fewer domains than `domains_per_batch`, a batch size that
                does not give equal parts, or a domain with too few examples for one batch.
        """
        if not isinstance(source, DomainSource):
            raise ValueError(f"{source.name} is not made of domains, so it has no batches of them")
        if not 1 <= domains_per_batch <= len(source.names):
            raise ValueError(
                f"data.domains_per_batch is {domains_per_batch}, but the domains are "
                f"{len(source.names)}: {', '.join(source.names)}"
            )
        unit = domains_per_batch * _CLASSES * accumulate
        if batch_size < 1 or batch_size % unit:
            below = batch_size - batch_size % unit
            raise ValueError(
                f"batch_size {batch_size} is not divisible by {unit}, which is "
                f"{domains_per_batch} domains x {_CLASSES} classes x accumulate ({accumulate}); "
                f"the nearest that are: {max(below, unit)} and {max(below, 0) + unit}"
            )
        self._rows = batch_size // (domains_per_batch * _CLASSES)
        self._sizes = np.diff(source.starts).tolist()
        for group, size in enumerate(self._sizes):
            if size < self._rows:
                raise ValueError(
                    f"the domain {source.names[group // _CLASSES]!r} has {size} "
                    f"{CLASS_NAMES[group % _CLASSES]} examples, but a batch takes {self._rows} of "
                    f"each class; set batch_size to at most {size * domains_per_batch * _CLASSES}"
                )
        self._starts = source.starts
        self._shares = np.array([float(share) for share in source.shares])
        self._seed = seed
        self._drawn = domains_per_batch
        self._group_seeds = [hashed(seed, _GROUPS, group) for group in range(len(self._sizes))]

    def domains(self, step: int) -> list[int]:
        """Return the numbers of the domains of a step, in the order of their blocks."""
        numbers = range(len(self._shares))
        chances = [(hashed(self._seed, _DRAWS, step, domain) + 0.5) / 2**64 for domain in numbers]
        # The first of several waiting times, whose rates are the shares, is a draw by shares.
        times = -np.log(np.array(chances)) / self._shares
        return np.argsort(times, kind="stable")[: self._drawn].tolist()

    def rows(self, step: int, first: int, stop: int) -> Rows:
        """Return rows `first` to `stop` of the batch, with their `domain`, int32."""
        domains = self.domains(step)
        groups = [_CLASSES * domain + label for domain in domains for label in range(_CLASSES)]
        indices = [
            self._starts[group]
            + batch_indices(self._sizes[group], self._rows, self._group_seeds[group], step)
            for group in groups
        ]
        block = _CLASSES * self._rows
        columns = {"domain": np.repeat(np.array(domains, np.int32), block)[first:stop]}
        positions = np.arange(first, stop, dtype=np.int64)
        return Rows(np.concatenate(indices)[first:stop], step, positions, columns)

    def alike(self, index: int) -> range:
        """Return the examples of the same domain and class."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return range(int(self._starts[group]), int(self._starts[group + 1]))


def domains_of(source: "Source", name: str) -> DomainSource:
    """Return the sources of a mixture, or a single source, as domains.

    Args:
        source: with labels.
        name: of a single source.

    Raises:
        ValueError: see `DomainSource`.
    """
    if isinstance(source, MixtureSource):
        return DomainSource(source.name, source.sources, source.names, source.shares)
    return DomainSource(source.name, [source], [name])


def domain_members(name: str) -> list[Member]:
    """Return the domains that the name of a source stands for, in the order of their numbers.

    Args:
        name: of a mixture, whose sources they are, or of another source, which is the only one.

    Raises:
        ValueError: a mixture that is not understood.
        FileNotFoundError: the JSON file of a mixture is not there.
    """
    kind, _, text = name.partition(":")
    return members_of(text) if kind == "mix" else [Member(name, Fraction(1))]


def domain_order(domains_per_batch: int, accumulate: int = 1) -> "OrderOf":
    """Return what makes the `DomainOrder` of a source, for `train_batches`."""
    return functools.partial(
        DomainOrder, domains_per_batch=domains_per_batch, accumulate=accumulate
    )


def leave_one_out(name: str) -> list[tuple[str, str]]:
    """Return for each source of a mixture the mixture of the others, and its own name.

    Args:
        name: `mix:1*folder:/a+1*folder:/b+1*folder:/c`, or `mix:FILE.json`.

    Returns:
        What to train on, which keeps shares and splits, and what to test on, without a split.

    Raises:
        ValueError: fewer than two sources, or a mixture that is not understood.
        FileNotFoundError: the JSON file is not there.
    """
    members = domain_members(name)
    if len(members) < 2:
        raise ValueError(f"{name!r} is one domain; to leave one out takes a mixture of several")
    return [
        ("mix:" + " + ".join(str(member) for member in members if member is not held), held.source)
        for held in members
    ]


def binary_labels(domain: str, source: "Source") -> np.ndarray:
    """Return whether each example of a source is fake, int32 `[n]` of 0 and 1.

    Args:
        domain: name of the source, for messages.
        source: with labels; where it does not know them all, its examples are read.

    Raises:
        ValueError: no labels, several labels an image, or classes that are neither real nor fake.
    """
    if source.num_classes is None or getattr(source, "multi_label", False):
        kind = "no labels" if source.num_classes is None else "several labels an image"
        raise ValueError(f"the domain {domain!r} has {kind}, but needs one: real or fake")
    names = source.class_names or tuple(map(str, range(source.num_classes)))
    matches = [_CLASS.fullmatch(name.strip()) for name in names]
    if unknown := [name for name, match in zip(names, matches) if match is None]:
        raise ValueError(
            f"the domain {domain!r} has classes that are neither real nor fake: "
            f"{', '.join(unknown)}; name them real and fake, or real-THIS and fake-THAT"
        )
    numbers = np.array([_LABELS[match[1].lower()] for match in matches if match], np.int32)
    labels = np.asarray(_all_labels(source))
    if len(labels) and labels.min() < 0:
        raise ValueError(
            f"the domain {domain!r} has {(labels < 0).sum()} examples without a label, but needs "
            "one for each: real or fake"
        )
    return numbers[labels] if len(labels) else labels.astype(np.int32)


def _all_labels(source: "Source") -> Any:
    known = getattr(source, "labels", None)
    if known is not None:
        return known
    _log.info("reading the labels of the %d examples of %s", len(source), source.name)
    labels = []
    for index in range(len(source)):
        example = record_of(source, index) or source[index]
        labels.append(example.get("label", -1))
    return labels


def _counts(domain: str, labels: np.ndarray) -> list[int]:
    """Return the number of real and of fake examples; raises `ValueError` if one is 0."""
    counts = np.bincount(labels, minlength=_CLASSES).tolist()
    if not all(counts):
        told = " and ".join(f"{count} {name}" for name, count in zip(CLASS_NAMES, counts))
        raise ValueError(
            f"the domain {domain!r} has {told} examples; a domain needs both classes, to balance "
            "them in training and to tell them apart in evaluation"
        )
    return counts
