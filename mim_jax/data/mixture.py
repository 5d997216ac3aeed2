"""Mixtures: several sources read as one, each with a fixed share of the examples."""

import dataclasses
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from mim_jax.data.order import permuted_index
from mim_jax.data.records import Record, record_of
from mim_jax.data.splits import split_name_and_bounds

if TYPE_CHECKING:
    from mim_jax.data.sources import Source

MAX_PERIOD = 100_000
"""Shares are multiples of one part in this many, or exact with a smaller denominator."""

# `0.7*folder:/a+0.3*tfds:x`: a plus parts two members only where a share follows.
_BETWEEN_MEMBERS = re.compile(r"\+(?=\s*-?[\d./]+\s*\*)")
_MEMBER = re.compile(r"\s*([^*\s]+)\s*\*\s*(.+?)\s*")
_FORM = "mix:0.7*folder:/a+0.3*tfds:x, or mix:FILE.json"


class MixtureSource:
    """Examples of several sources in fixed shares.

    Example i is a pure function of i, without state:

    - *Which source.* The sources take turns in a pattern that repeats with the common denominator
      of the shares. Of the first n examples, every source has its share of n to within less than
      one example; so any block of consecutive examples has every share to within less than two,
      with two sources within one. Training permutes the examples of an epoch, so there a batch
      has the shares on average; batches with fixed shares take blocks of consecutive examples.
    - *Which of its examples.* A source is walked in a pseudo-random permutation, then in another,
      and so on.

    An epoch of the mixture is as long as it takes until every example of every source has come at
    least once: the largest `examples / share`. The source that sets this length comes once, the
    others come more often. To train for a length of your own, set `steps` in the config.

    A mixture has labels if all its sources have, and either all name their classes or none does.
    Named classes are put together in the order in which they first appear; without names, equal
    numbers mean the same class.

    Attributes: as for `Source`, and
        shares: of each source, adding up to 1.
        sources: themselves.
        names: what each source was called by, without its split.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence["Source"],
        shares: Sequence[Fraction],
        names: Sequence[str] | None = None,
    ) -> None:
        """Mix sources.

        Args:
            name: for messages.
            sources: one or more.
            shares: positive, of each source; only their proportion counts.
            names: of each source, as it was asked for; None for the names that they have.

        Raises:
            ValueError: no source, an empty source, a share that is not positive, or sources of
                several kinds.
        """
        _check_members(name, sources, shares)
        weights = whole_shares(shares)
        self.name = name
        self.shares = tuple(Fraction(int(weight), int(weights.sum())) for weight in weights)
        self.num_classes: int | None = None
        self.class_names: tuple[str, ...] | None = None
        self.multi_label = False
        self.kind = getattr(sources[0], "kind", "image")
        self.sources = tuple(sources)
        self.names = tuple(names or (source.name for source in sources))
        self._weights = weights
        self._turns, self._turn_ranks = turns(weights)
        self._new_labels: list[np.ndarray] | None = None
        if all(source.num_classes is not None for source in sources):
            self._join_classes()
        self._length = max(
            -(-len(source) * share.denominator // share.numerator)
            for source, share in zip(sources, self.shares)
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the example of the source whose turn it is, its label as in `class_names`."""
        member, inner = self.place(index)
        return self._relabelled(self.sources[member][inner], member)

    def record(self, index: int) -> Record | None:
        """Return the example with its image undecoded; None if its source holds no files."""
        member, inner = self.place(index)
        record = record_of(self.sources[member], inner)
        return None if record is None else self._relabelled(record, member)

    def place(self, index: int) -> tuple[int, int]:
        """Return the number of the source of an example, and the index of the example in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples, none with index {index}")
        period, turn = divmod(index, len(self._turns))
        member = int(self._turns[turn])
        visit = period * int(self._weights[member]) + int(self._turn_ranks[turn])
        length = len(self.sources[member])
        epoch, position = divmod(visit, length)
        return member, permuted_index(position, length, seed=member, epoch=epoch)

    def _join_classes(self) -> None:
        """Number the classes anew; leave the mixture unlabelled if the sources do not fit."""
        if len({getattr(source, "multi_label", False) for source in self.sources}) > 1:
            return
        named = [source.class_names for source in self.sources if source.class_names is not None]
        if named and len(named) < len(self.sources):
            return
        self.multi_label = getattr(self.sources[0], "multi_label", False)
        if not named:
            self.num_classes = max(source.num_classes or 0 for source in self.sources)
            own = [np.arange(source.num_classes or 0) for source in self.sources]
        else:
            number: dict[str, int] = {}
            for name in itertools.chain.from_iterable(named):
                number.setdefault(name, len(number))
            self.class_names, self.num_classes = tuple(number), len(number)
            own = [np.array([number[name] for name in names]) for names in named]
        self._new_labels = own

    def _relabelled(self, example: dict[str, Any], member: int) -> dict[str, Any]:
        """Return an example with its label by the numbers of the mixture, or without."""
        label = example.get("label")
        if label is None or self._new_labels is None:
            return {key: value for key, value in example.items() if key != "label"}
        numbers = self._new_labels[member]
        if isinstance(label, np.ndarray):
            vector = np.zeros(self.num_classes or 0, np.uint8)
            vector[numbers] = label
            return {**example, "label": vector}
        if isinstance(label, list):
            return {**example, "label": numbers[label].tolist()}
        return {**example, "label": int(numbers[label])}


@dataclasses.dataclass(frozen=True)
class Member:
    """One source as a mixture names it.

    Attributes:
        source: its name.
        share: positive.
        split: its own, which stands for the split `train`; None if it has none.
    """

    source: str
    share: Fraction
    split: str | None = None

    def split_for(self, split: str) -> str:
        """Return the split to ask the source for where the mixture is asked for one."""
        return self.split if self.split and split == "train" else split

    def __str__(self) -> str:
        """Return the member as a mixture writes it."""
        return f"{self.share}*{self.source}" + (f"|{self.split}" if self.split else "")


def open_mixture(
    text: str, split: str, open_member: Callable[[str, str], "Source"]
) -> MixtureSource:
    """Open the sources of a mixture.

    Args:
        text: `0.7*folder:/a+0.3*tfds:x|train[:90%]`, or the path of a JSON file
            `{"sources": [{"source": "folder:/a", "share": 0.7, "split": "train[:90%]"}, ...]}`.
            Shares are numbers or fractions such as `1/3`; only their proportion counts. A split of
            its own stands for the split `train`; any other split is asked of every source by name.
        split: a split name without slice.
        open_member: `(name, split) -> source`.

    Raises:
        ValueError: a mixture that is not understood, a share that is not positive, an unknown
            source, a mixture within a mixture, or a slice of a mixture.
        FileNotFoundError: the JSON file or the data of a source are not there.
    """
    if split_name_and_bounds(split)[1] is not None:
        raise ValueError(
            f"split {split!r}: a mixture cannot be sliced, for its examples repeat, and one part "
            "would hold examples of the other; slice its sources: "
            "'mix:0.7*folder:/a|train[:90%]+0.3*folder:/b|train[:90%]'"
        )
    members = members_of(text)
    sources = []
    for number, member in enumerate(members, 1):
        if member.source.startswith("mix:"):
            raise ValueError(f"source {number} of the mixture is a mixture itself: {member.source}")
        try:
            sources.append(open_member(member.source, member.split_for(split)))
        except (ValueError, OSError, ImportError) as error:
            kind = FileNotFoundError if isinstance(error, OSError) else ValueError
            raise kind(f"source {number} of the mixture, {member.source!r}: {error}") from error
    name = f"mix:{text}" if split == "train" else f"mix:{text}:{split}"
    names = [member.source for member in members]
    return MixtureSource(name, sources, [member.share for member in members], names)


def members_of(text: str) -> list[Member]:
    """Return the sources that a mixture names, without opening them.

    Args:
        text: as for `open_mixture`.

    Raises:
        ValueError: a mixture that is not understood.
        FileNotFoundError: the JSON file is not there.
    """
    in_file = text.endswith(".json") and "*" not in text
    return _members_of_file(text) if in_file else _members_inline(text)


def whole_shares(shares: Sequence[Fraction]) -> np.ndarray:
    """Return the smallest whole numbers in the proportion of `shares`, int64 `[n]`.

    If they add up to more than `MAX_PERIOD`, they are rounded so that they add up to that, none of
    them to zero.
    """
    total = sum(shares)
    parts = [share / total for share in shares]
    period = math.lcm(*(part.denominator for part in parts))
    if period <= MAX_PERIOD:
        return np.array([int(part * period) for part in parts], np.int64)
    whole = np.array([max(1, int(part * MAX_PERIOD)) for part in parts], np.int64)
    # The largest remainders are rounded up, or the largest shares bear what is too much.
    lack = MAX_PERIOD - int(whole.sum())
    if lack < 0:
        whole[np.argmax(whole)] += lack
        return whole
    remainders = [float(part * MAX_PERIOD - int(count)) for part, count in zip(parts, whole)]
    whole[np.argsort(remainders, kind="stable")[::-1][:lack]] += 1
    return whole


def turns(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return whose turn it is in each place of a period, and the which of its turns this is.

    Of the first n turns, source i has `weights[i] / sum(weights) * n` to within
    `1 - 1 / (2 * sources - 2)`. At every turn, of the sources that have fallen behind far enough,
    that one comes which would be the first to fall behind too far.

    Reference: R. Tijdeman, "The Chairman Assignment Problem", Discrete Mathematics 32, 1980.

    Args:
        weights: positive, int64 `[sources]`.

    Returns:
        Two int32 `[sum(weights)]`.
    """
    period, slack = int(weights.sum()), max(1, 2 * len(weights) - 2)
    taken = np.zeros_like(weights)
    whose = np.zeros(period, np.int32)
    ranks = np.zeros(period, np.int32)
    for turn in range(period):
        # In units of one example / (period * slack), so that all is in whole numbers.
        behind = (weights * (turn + 1) - taken * period) * slack
        urgency = np.where(behind >= period, (period * (slack - 1) - behind) / weights, np.inf)
        member = int(np.argmin(urgency))
        whose[turn], ranks[turn] = member, taken[member]
        taken[member] += 1
    return whose, ranks


def _members_inline(text: str) -> list[Member]:
    members = []
    for part in _BETWEEN_MEMBERS.split(text):
        match = _MEMBER.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} in the mixture has no share; write {_FORM}")
        source, _, split = match[2].partition("|")
        members.append(Member(source.strip(), _share(match[1], source), split.strip() or None))
    return members


def _members_of_file(path: str) -> list[Member]:
    try:
        content = json.loads(pathlib.Path(path).expanduser().read_text())
        return [
            Member(entry["source"], _share(entry["share"], entry["source"]), entry.get("split"))
            for entry in content["sources"]
        ]
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no mixture file {path!r}") from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a mixture ({type(error).__name__}: {error}); write "
            '{"sources": [{"source": "folder:/a", "share": 0.7}, ...]}'
        ) from error


def _share(value: Any, source: str) -> Fraction:
    """Return a share, exactly as written in decimals."""
    try:
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"the share {value!r} of {source!r} is not a number; write for example 0.3 or 1/3"
        ) from None


def _check_members(name: str, sources: Sequence["Source"], shares: Sequence[Fraction]) -> None:
    if not sources or len(sources) != len(shares):
        raise ValueError(f"{name}: {len(sources)} sources and {len(shares)} shares; write {_FORM}")
    for source, share in zip(sources, shares):
        if share <= 0:
            raise ValueError(
                f"the share of {source.name!r} is {share}, but must be above 0; leave the source "
                "out if it is not wanted"
            )
        if not len(source):
            raise ValueError(f"{source.name} has no examples, so it cannot have a share")
    kinds = {getattr(source, "kind", "image") for source in sources}
    if len(kinds) > 1:
        raise ValueError(f"{name} mixes examples of the kinds {', '.join(sorted(kinds))}")
