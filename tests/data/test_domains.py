import collections
import logging
import pathlib
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax import config as configs
from mim_jax.data import EvaluationCrop, train_batches
from mim_jax.data.configured import training_source
from mim_jax.data.decode import UnreadableImage
from mim_jax.data.domains import (
    DomainOrder,
    DomainSource,
    domain_members,
    domain_order,
    domains_of,
    leave_one_out,
)
from mim_jax.data.mixture import open_mixture
from mim_jax.data.order import steps_per_epoch
from mim_jax.data.pipeline import Batch
from mim_jax.data.sources import ArraySource, Source, open_source
from mim_jax.training.experiment import training_batches, training_rows
from mim_jax.training.step import micro_batches
from tests.data.images import write_images

FOUR = np.zeros((4, 1, 1, 1), np.uint8)
CENTRE = EvaluationCrop((4, 4), 1.0)
DOMAINS_OF_STEPS = [[0, 1], [0, 2], [2, 0], [1, 0], [1, 2], [2, 0], [0, 1], [2, 1]]
INDICES_OF_STEP_11 = [50, 56, 70, 73, 4, 3, 15, 12]
MIXTURE = "mix:1*folder:/ff + 1*folder:/celeb|train[:90%] + 2*tfds:dfdc"


def one_domain(
    first: int, real: int, fake: int, class_names: tuple[str, ...] | None = ("fake", "real")
) -> ArraySource:
    """Images filled with numbers that count up, real and fake in turns as long as there are."""
    is_fake = np.arange(real + fake) % 2 == 1
    is_fake[2 * min(real, fake) :] = fake > real
    values = np.arange(first, first + real + fake, dtype=np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (real + fake, 4, 4, 1))
    own = is_fake if class_names is None or class_names[0] in ("real", "0") else ~is_fake
    return ArraySource(f"array {first}", images, own.astype(int), class_names)


def three_domains(shares: tuple[int, ...] = (1, 1, 1)) -> DomainSource:
    """Domains of 20, 30 and 25 examples; their images have the values from 0, 50 and 100 on."""
    sources = [one_domain(0, 10, 10), one_domain(50, 12, 18), one_domain(100, 20, 5)]
    return DomainSource("three", sources, ("a", "b", "c"), [Fraction(share) for share in shares])


def batches(source: Source, steps: int, batch_size: int = 12, **options: Any) -> list[Batch]:
    order = domain_order(options.pop("domains_per_batch", 2), options.pop("accumulate", 1))
    options = {"seed": 3, "batch_size": batch_size, "num_steps": steps, "order": order, **options}
    reading = train_batches(source, lambda image, rng: CENTRE(image), **options)
    collected = [{name: np.array(array) for name, array in batch.items()} for batch in reading]
    reading.close()
    return collected


class Noisy:
    """Adds a random number to an image: a transform whose randomness can be compared."""

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return image + rng.integers(0, 100, dtype=np.uint8)


def test_domains_lie_one_after_another_real_before_fake() -> None:
    source = three_domains()
    assert len(source) == 75
    assert source.starts.tolist() == [0, 10, 20, 32, 50, 70, 75]
    assert np.bincount(source.labels).tolist() == [42, 33]
    values = set()
    for index in range(75):
        example = source[index]
        assert example["label"] == source.labels[index]
        assert example["domain"] == index // 10 // 2 if index < 20 else 1 if index < 50 else 2
        assert example["image"][0, 0, 0] // 50 == example["domain"]
        values.add(int(example["image"][0, 0, 0]))
    assert len(values) == 75
    with pytest.raises(IndexError, match="three has 75 examples"):
        source[75]


def test_a_batch_is_blocks_of_domains_each_half_real_half_fake() -> None:
    source, seen = three_domains(), set()
    for batch in batches(source, 30):
        assert batch["domain"].dtype == np.int32 and batch["label"].dtype == np.int32
        first, second = batch["domain"][0], batch["domain"][6]
        assert first != second
        assert batch["domain"].tolist() == [first] * 6 + [second] * 6
        assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1] * 2
        assert (batch["image"][:, 0, 0, 0] // 50 == batch["domain"]).all()
        assert len(np.unique(batch["index"])) == 12
        for index, label, image in zip(batch["index"], batch["label"], batch["image"], strict=True):
            example = source[index]
            assert example["label"] == label
            np.testing.assert_array_equal(example["image"], image)
        seen.add((int(first), int(second)))
    assert len(seen) == 6  # each domain meets each other in either role


@settings(max_examples=10, deadline=None)
@given(
    start=st.integers(0, 9),
    process_count=st.sampled_from([1, 2, 3, 4]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_batch_depends_on_seed_and_step_alone(
    start: int, process_count: int, threads: int, seed: int
) -> None:
    options: dict[str, Any] = dict(batch_size=12, seed=seed, order=domain_order(2))
    whole = list(train_batches(three_domains(), Noisy(), num_steps=10, threads=1, **options))
    parts = [
        list(
            train_batches(
                three_domains(),
                Noisy(),
                start_step=start,
                num_steps=10 - start,
                threads=threads,
                process_index=process,
                process_count=process_count,
                **options,
            )
        )
        for process in range(process_count)
    ]
    for step, expected in enumerate(whole[start:]):
        for name, array in expected.items():
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, array, err_msg=name)


def test_worker_processes_give_the_same_batches() -> None:
    text = "1*synthetic:collections:0 + 1*synthetic:collections:3"
    source = domains_of(open_mixture(text, "test", open_source), "mixture")
    here, there = (
        list(
            train_batches(
                source,
                Noisy(),
                batch_size=8,
                seed=5,
                start_step=2,
                num_steps=3,
                workers=workers,
                order=domain_order(2),
            )
        )
        for workers in (0, 1)
    )
    for first, second in zip(here, there, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


def test_the_examples_of_a_group_come_in_permutations() -> None:
    source = three_domains()
    order = DomainOrder(source, 20, 7, domains_per_batch=3 - 1)
    # Five rows of each domain and class: the real ones of `a` are walked in two steps.
    counts = collections.Counter[int]()
    for step in range(400):
        counts.update(order.rows(step, 0, 20).indices.tolist())
    assert set(counts) == set(range(75))
    for group, (start, stop) in enumerate(zip(source.starts, source.starts[1:], strict=False)):
        of_group = np.array([counts[index] for index in range(start, stop)])
        expected = 400 * 2 / 3 * 5 / (stop - start)
        assert np.abs(of_group - expected).max() < 0.35 * expected, group
    pair = [set(order.rows(step, 0, 20).indices.tolist()) & set(range(10)) for step in range(400)]
    drawn_twice = [
        (first, second)
        for first, second in zip(pair[::2], pair[1::2], strict=True)
        if first and second
    ]
    assert len(drawn_twice) > 50
    assert all(not first & second for first, second in drawn_twice)


def test_an_order_never_changes_between_versions() -> None:
    """These values are part of the contract: a changed order breaks the continuing of a run."""
    order = DomainOrder(three_domains(), 8, 0, domains_per_batch=2)
    assert [order.domains(step) for step in range(8)] == DOMAINS_OF_STEPS
    assert order.rows(11, 0, 8).indices.tolist() == INDICES_OF_STEP_11


@pytest.mark.parametrize("shares", [(1, 1, 1), (1, 2, 5)])
def test_domains_are_drawn_by_their_shares(shares: tuple[int, ...]) -> None:
    order = DomainOrder(three_domains(shares), 8, 1, domains_per_batch=2)
    drawn = np.array([order.domains(step) for step in range(6000)])
    assert (drawn[:, 0] != drawn[:, 1]).all()
    p = np.array(shares) / sum(shares)
    for first in range(3):
        for second in range(3):
            if first != second:
                expected = p[first] * p[second] / (1 - p[first])
                share = ((drawn[:, 0] == first) & (drawn[:, 1] == second)).mean()
                assert abs(share - expected) < 5 * np.sqrt(expected / 6000)


def test_an_unreadable_example_is_replaced_within_its_domain_and_class(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = three_domains()
    broken = {*range(20, 30), 31, 74}  # all but one of the real ones of b, and the last of all

    class Broken(DomainSource):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index in broken:
                raise UnreadableImage(f"{index} is broken")
            return super().__getitem__(index)

    source.__class__ = Broken
    replaced = 0
    with caplog.at_level(logging.CRITICAL):
        for batch in batches(source, 40):
            np.testing.assert_array_equal(batch["unreadable"], np.isin(batch["index"], [*broken]))
            replaced += int(batch["unreadable"].sum())
            assert (batch["image"][:, 0, 0, 0] // 50 == batch["domain"]).all()
            real_of_b = batch["image"][(batch["domain"] == 1) & (batch["label"] == 0)]
            assert set(real_of_b[:, 0, 0, 0]) <= {source[30]["image"][0, 0, 0]}
    assert replaced > 60


def test_views_of_an_example_have_its_domain() -> None:
    class Twice:
        whole_examples = True
        views = 2

        def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
            return {"image": np.stack([example["image"]] * 2)}

    (batch,) = train_batches(
        three_domains(), Twice(), batch_size=16, seed=0, num_steps=1, order=domain_order(2)
    )
    assert batch["image"].shape == (16, 4, 4, 1)
    assert (batch["image"][:, 0, 0, 0] // 50 == batch["domain"]).all()
    assert batch["label"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 2


@pytest.mark.parametrize("accumulate", [1, 3])
def test_micro_batches_have_the_blocks_of_the_batch(accumulate: int) -> None:
    (batch,) = batches(three_domains(), 1, accumulate=accumulate)
    micro = micro_batches({name: batch[name] for name in ("domain", "label")}, accumulate)
    rows = 12 // accumulate
    for domain, label in zip(micro["domain"], micro["label"], strict=True):
        assert domain.tolist() == [batch["domain"][0]] * (rows // 2) + [batch["domain"][6]] * (
            rows // 2
        )
        assert label.tolist() == ([0] * (rows // 4) + [1] * (rows // 4)) * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10}, r"not divisible by 4, which is 2 domains x 2 .*: 8 and 12"),
        ({"batch_size": 2}, r"not divisible by 4.*: 4 and 4"),
        ({"batch_size": 12, "accumulate": 2}, r"by 8, .* x accumulate \(2\).*: 8 and 16"),
        ({"domains_per_batch": 4}, r"domains_per_batch is 4, but the domains are 3: a, b, c"),
        ({"domains_per_batch": 0}, "domains_per_batch is 0"),
        ({"batch_size": 24}, "'c' has 5 fake examples, but a batch takes 6 .* at most 20"),
        ({"batch_size": 0}, "batch_size 0 is not divisible"),
    ],
)
def test_a_batch_that_cannot_be_made_is_an_error(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(three_domains(), 1, **options)


def test_another_source_has_no_batches_of_domains() -> None:
    with pytest.raises(ValueError, match="array 0 is not made of domains"):
        batches(one_domain(0, 10, 10), 1)


@pytest.mark.parametrize(
    ("class_names", "fake"),
    [
        (("real", "fake"), (0, 1)),
        (("Fake", "Real"), (1, 0)),
        (("0", "1"), (0, 1)),
        (("fake_swap", "fake-face.2", "real youtube"), (1, 1, 0)),
        (None, (0, 1)),
    ],
)
def test_classes_are_told_by_their_names(
    class_names: tuple[str, ...] | None, fake: tuple[int, ...]
) -> None:
    labels = np.arange(12) % len(fake)
    images = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1)
    source = DomainSource("x", [ArraySource("x", images, labels, class_names)], ["x"])
    for index in range(12):
        example = source[index]
        assert example["label"] == fake[int(example["image"].item()) % len(fake)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (one_domain(0, 6, 0), "'b' has 6 real and 0 fake examples; a domain needs both classes"),
        (one_domain(0, 0, 6, None), "'b' has 0 real and 6 fake examples"),
        (
            ArraySource("x", FOUR, np.arange(4), ("cat", "real", "a1", "1")),
            "'b' has classes that are neither real nor fake: cat, a1; name them real and fake",
        ),
        (
            ArraySource("x", FOUR, np.arange(4)),
            "'b' has classes that are neither real nor fake: 2, 3",
        ),
        (ArraySource("x", FOUR), "'b' has no labels"),
        (
            ArraySource("x", np.zeros((2, 1, 1, 1), np.uint8), np.array([0, -1]), ("real", "fake")),
            "'b' has 1 examples without a label",
        ),
    ],
)  # fmt: skip
def test_a_domain_without_real_and_fake_is_an_error(source: ArraySource, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DomainSource("two", [one_domain(0, 2, 2), source], ["a", "b"])


def test_several_labels_an_image_and_equal_names_are_errors() -> None:
    source = one_domain(0, 2, 2)
    with pytest.raises(ValueError, match="each domain must have a name of its own"):
        DomainSource("two", [source, source], ["a", "a"])
    source.multi_label = True
    with pytest.raises(ValueError, match="'a' has several labels an image"):
        DomainSource("one", [source], ["a"])


def test_labels_that_are_not_known_beforehand_are_read() -> None:
    plain = one_domain(0, 5, 7)

    class Unknowing:
        name, num_classes, class_names = plain.name, plain.num_classes, plain.class_names

        def __len__(self) -> int:
            return len(plain)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return plain[index]

    read, known = (DomainSource("x", [source], ["x"]) for source in (Unknowing(), plain))
    assert [read.place(i) for i in range(12)] == [known.place(i) for i in range(12)]


def test_folders_of_real_and_fake_images_are_domains(tmp_path: pathlib.Path) -> None:
    for folder, count in (("a/real", 3), ("a/fake", 4), ("b/0", 5), ("b/1", 2)):
        write_images(tmp_path / folder, count)
    text = f"1*folder:{tmp_path}/a + 1*folder:{tmp_path}/b"
    source = domains_of(open_mixture(text, "train", open_source), "mixture")
    assert source.names == (f"folder:{tmp_path}/a", f"folder:{tmp_path}/b")
    assert source.starts.tolist() == [0, 3, 7, 12, 14]
    for index in range(14):
        example, record = source[index], source.record(index)
        assert record is not None
        assert (record["label"], record["domain"]) == (example["label"], example["domain"])
        assert ("real" in record["name"] or "0/" in record["name"]) == (example["label"] == 0)
    assert source.segmentation(0) is None
    copied = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copied[13]["image"], source[13]["image"])


def test_a_config_trains_on_batches_of_domains() -> None:
    names = [f"synthetic:collections:{number}" for number in (2, 0)]
    fields = {
        "data.source": "mix:" + " + ".join(f"1*{name}" for name in names),
        "data.batches": "domains",
        "data.image_size": (32, 32),
        "data.channels": 3,
        "data.mean": (0.5,) * 3,
        "data.std": (0.25,) * 3,
        "batch_size": 16,
    }
    config = configs.load("mae:tiny", fields)
    source = training_source(config)
    assert isinstance(source, DomainSource)
    assert source.names == tuple(names)
    assert steps_per_epoch(training_rows(config, source), 16) == 4000 // 16
    (batch,) = training_batches(config, source, 5, 1)
    assert sorted(set(batch["domain"].tolist())) == [0, 1]
    assert batch["image"].shape == (16, 32, 32, 3)
    alone = configs.load("mae:tiny", {**fields, "data.source": names[1]})
    assert training_source(alone).names == (names[1],)


def test_an_unknown_kind_of_batches_is_an_error() -> None:
    config = configs.load("mae:tiny", {"data.batches": "balanced"})
    with pytest.raises(
        ValueError, match=r"data\.batches is 'balanced'; known are shuffled, domains"
    ):
        configs.resolve(config, "cpu")


def test_leaving_one_out_keeps_shares_and_splits_of_the_others() -> None:
    held = leave_one_out(MIXTURE)
    assert [test for _, test in held] == ["folder:/ff", "folder:/celeb", "tfds:dfdc"]
    members = domain_members(MIXTURE)
    for number, (training, _) in enumerate(held):
        assert domain_members(training) == members[:number] + members[number + 1 :]
    assert held[0][0] == "mix:1*folder:/celeb|train[:90%] + 2*tfds:dfdc"
    with pytest.raises(ValueError, match="'folder:/ff' is one domain"):
        leave_one_out("folder:/ff")


def test_the_domains_of_a_mixture_in_a_file_are_its_sources(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "all.json"
    file.write_text(
        '{"sources": [{"source": "folder:/a", "share": 0.5, "split": "train[:50%]"},'
        ' {"source": "folder:/b", "share": 0.5}]}'
    )
    assert [member.source for member in domain_members(f"mix:{file}")] == ["folder:/a", "folder:/b"]
    assert leave_one_out(f"mix:{file}")[1] == ("mix:1/2*folder:/a|train[:50%]", "folder:/b")
