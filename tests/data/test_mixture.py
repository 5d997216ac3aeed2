import collections
import json
import os
import pathlib
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax.data import RandomResizedCrop, array_record, open_source, train_batches
from mim_jax.data.mixture import MAX_PERIOD, MixtureSource, turns, whole_shares
from mim_jax.data.order import permuted_index, permuted_indices
from mim_jax.data.records import record_of
from mim_jax.data.sources import ArraySource
from tests.data.images import write_images
from tests.data.test_array_record import grey_png, write_shard


def numbered(
    name: str, count: int, first: int = 0, class_names: tuple[str, ...] | None = None
) -> ArraySource:
    """`count` images of one pixel, whose values count up; labels count in the classes."""
    images = np.arange(first, first + count, dtype=np.uint16).reshape(-1, 1, 1, 1)
    labels = None if class_names is None else np.arange(count) % len(class_names)
    return ArraySource(name, images, labels, class_names)


def mixture(*sizes_and_shares: tuple[int, str]) -> MixtureSource:
    """Of sources in which source i has the values from 1000 i on."""
    sources = [numbered(str(i), n, 1000 * i) for i, (n, _) in enumerate(sizes_and_shares)]
    return MixtureSource("mix", sources, [Fraction(share) for _, share in sizes_and_shares])


def value_at(source: MixtureSource, index: int) -> int:
    return int(source[index]["image"].item())


weights_of_sources = st.lists(st.integers(1, 60), min_size=1, max_size=12)


@given(weights_of_sources)
def test_every_beginning_has_the_shares_to_within_one_example(weights: list[int]) -> None:
    whose, ranks = turns(np.array(weights, np.int64))
    for source, weight in enumerate(weights):
        taken = np.cumsum(whose == source)
        wanted = weight / sum(weights) * np.arange(1, len(whose) + 1)
        assert np.abs(taken - wanted).max() < 1
        assert taken[-1] == weight
        np.testing.assert_array_equal(ranks[whose == source], np.arange(weight))


@given(st.integers(1, 200), st.integers(1, 200), st.data())
@settings(max_examples=50)
def test_with_two_sources_every_block_has_the_shares_to_within_one(
    first: int, second: int, data: st.DataObject
) -> None:
    whose = np.tile(turns(np.array([first, second], np.int64))[0], 3)
    start = data.draw(st.integers(0, len(whose) - 1))
    stop = data.draw(st.integers(start + 1, len(whose)))
    taken = int((whose[start:stop] == 0).sum())
    assert abs(taken - (stop - start) * first / (first + second)) <= 1


def test_blocks_of_a_period_have_exactly_the_shares() -> None:
    source = mixture((50, "0.5"), (50, "0.3"), (50, "0.2"))
    for start in range(0, 200, 10):
        members = collections.Counter(source.place(i)[0] for i in range(start, start + 10))
        assert members == {0: 5, 1: 3, 2: 2}


def test_each_source_is_walked_in_one_permutation_after_another() -> None:
    source = mixture((7, "3"), (10, "1"))
    visits = [value_at(source, i) for i in range(len(source)) if source.place(i)[0] == 0]
    assert len(visits) == 30
    passes = [visits[start : start + 7] for start in range(0, 28, 7)]
    for one in passes:
        assert sorted(one) == list(range(7))
    assert len({tuple(one) for one in passes}) > 1


def test_an_epoch_brings_every_example_at_least_once() -> None:
    source = mixture((70, "0.7"), (50, "0.3"), (3, "0.01"))
    seen = {value_at(source, i) for i in range(len(source))}
    assert seen == {*range(70), *range(1000, 1050), *range(2000, 2003)}
    assert len(source) == 303


def test_an_epoch_of_shares_by_size_brings_every_example_once() -> None:
    source = mixture((60, "60"), (40, "40"))
    assert len(source) == 100
    assert len({value_at(source, i) for i in range(100)}) == 100


def test_examples_are_a_function_of_the_index_alone() -> None:
    source = mixture((7, "0.2"), (10, "0.8"))
    again = pickle.loads(pickle.dumps(mixture((7, "0.2"), (10, "0.8"))))
    expected = [value_at(source, i) for i in range(len(source))]
    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        assert value_at(again, index) == expected[index]
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f"none with index {index}"):
            source[index]


@given(st.integers(1, 10_000), st.integers(0, 2**64 - 1), st.integers(0, 1000), st.data())
@settings(max_examples=50)
def test_one_permuted_index_is_that_of_the_array(
    length: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    position = data.draw(st.integers(0, length - 1))
    expected = permuted_indices(np.array([position]), length, seed, epoch)
    assert permuted_index(position, length, seed, epoch) == expected[0]


def test_shares_are_exact_as_written() -> None:
    source = open_source("mix:0.1*embedded+0.7*embedded|test+.2*embedded")
    assert isinstance(source, MixtureSource)
    assert source.shares == (Fraction(1, 10), Fraction(7, 10), Fraction(2, 10))
    assert whole_shares([Fraction("1/3"), Fraction("1/7")]).tolist() == [7, 3]


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=20))
def test_shares_without_a_small_denominator_are_rounded(shares: list[int]) -> None:
    whole = whole_shares([Fraction(share) for share in shares])
    assert whole.sum() <= MAX_PERIOD and whole.min() >= 1
    error = np.abs(whole / whole.sum() - np.array(shares) / sum(shares))
    assert error.max() <= len(shares) / MAX_PERIOD


def test_class_names_are_put_together_and_labels_follow() -> None:
    cats = numbered("cats", 4, class_names=("cat", "dog"))
    birds = numbered("birds", 6, 1000, class_names=("bird", "cat", "ant"))
    source = MixtureSource("mix", [cats, birds], [Fraction(1), Fraction(1)])
    assert source.class_names == ("cat", "dog", "bird", "ant") and source.num_classes == 4
    for index in range(len(source)):
        member, inner = source.place(index)
        own = (cats, birds)[member]
        assert own.class_names is not None and source.class_names is not None
        assert source.class_names[source[index]["label"]] == own.class_names[own[inner]["label"]]
        assert type(source[index]["label"]) is int


def test_an_unlabelled_source_leaves_the_mixture_unlabelled() -> None:
    named, bare = numbered("a", 4, class_names=("cat", "dog")), numbered("b", 4)
    source = MixtureSource("mix", [named, bare], [Fraction(1), Fraction(1)])
    assert source.num_classes is None and source.class_names is None
    assert all(set(source[i]) == {"image"} for i in range(len(source)))


def test_classes_without_names_keep_their_numbers() -> None:
    images = np.zeros((3, 1, 1, 1), np.uint8)
    few, many = ArraySource("a", images, np.arange(3)), ArraySource("b", images, np.arange(3) + 4)
    source = MixtureSource("mix", [few, many], [Fraction(1), Fraction(1)])
    assert source.num_classes == 7 and source.class_names is None
    assert {source[i]["label"] for i in range(6)} == {0, 1, 2, 4, 5, 6}
    named = numbered("c", 3, class_names=("cat", "dog"))
    assert MixtureSource("mix", [few, named], [Fraction(1)] * 2).num_classes is None


def test_vectors_of_labels_follow_their_names(tmp_path: pathlib.Path) -> None:
    for name, classes, label in (("a", ["cat", "dog"], [1]), ("b", ["ant", "dog"], [0, 1])):
        record = msgpack.packb({"image": grey_png(1), "label": label})
        write_shard(tmp_path / name / "x.array_record", [record])
        shards = [{"file": "x.array_record", "examples": 1}]
        described = {"version": 1, "class_names": classes, "num_classes": 2, "multi_label": True}
        manifest = {**described, "splits": {"train": {"shards": shards}}}
        (tmp_path / name / "dataset.json").write_text(json.dumps(manifest))
    source = open_source(f"mix:1*{tmp_path}/a+1*{tmp_path}/b")
    assert source.class_names == ("cat", "dog", "ant")
    assert source.multi_label  # type: ignore[attr-defined]
    assert sorted(source[i]["label"].tolist() for i in range(2)) == [[0, 1, 0], [0, 1, 1]]
    records = [record_of(source, i) for i in range(2)]
    assert sorted(record["label"] for record in records if record) == [[1], [2, 1]]
    single = numbered("c", 3, class_names=("cat", "dog"))
    with_vectors = open_source(str(tmp_path / "a"))
    assert MixtureSource("mix", [with_vectors, single], [Fraction(1)] * 2).num_classes is None


def test_sources_may_have_splits_of_their_own(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "a+b" / "train", 10)
    write_images(tmp_path / "a+b" / "val", 2)
    name = f"mix:1*folder:{tmp_path}/a+b|train[:50%] + 1*embedded|test"
    source = open_source(name, channels=3)
    assert len(source) == 2000
    values = {int(source[i]["image"].max()) for i in range(20) if source.place(i)[0] == 0}  # type: ignore[attr-defined]
    assert len(values) == 5
    with pytest.raises(ValueError, match=r"source 2 .*'embedded': .*'train' and 'test', not 'val'"):
        open_source(name, "val")


def test_a_mixture_may_be_a_file(tmp_path: pathlib.Path) -> None:
    sources = [
        {"source": "embedded", "share": 0.7},
        {"source": "embedded", "share": "3/10", "split": "test[:500]"},
    ]
    (tmp_path / "x.json").write_text(json.dumps({"sources": sources}))
    source = open_source(f"mix:{tmp_path}/x.json")
    assert isinstance(source, MixtureSource)
    assert source.shares == (Fraction(7, 10), Fraction(3, 10))
    assert len(source) == -(-4000 * 10 // 7)
    assert source.num_classes == 10


def test_records_pass_through(tmp_path: pathlib.Path) -> None:
    write_shard(tmp_path / "x.array_record", [msgpack.packb({"image": grey_png(5), "name": "n"})])
    source = open_source(f"mix:1*{tmp_path}/x.array_record+1*embedded")
    records = {i: record_of(source, i) for i in range(2)}
    assert {"image": grey_png(5), "name": "n"} in records.values()
    assert None in records.values()


def test_training_batches_have_the_shares_on_average() -> None:
    source = open_source("mix:0.75*embedded+0.25*embedded|test")
    crop = RandomResizedCrop((4, 4))
    batches = train_batches(source, crop, batch_size=64, seed=0, num_steps=20)
    indices = np.concatenate([batch["index"] for batch in batches])
    share = np.mean([source.place(int(i))[0] == 0 for i in indices])  # type: ignore[attr-defined]
    assert abs(share - 0.75) < 0.04


def test_fifty_sources_add_no_threads_and_few_files(tmp_path: pathlib.Path) -> None:
    shards = 4
    for number in range(50):
        for shard in range(shards):
            path = tmp_path / f"{number}.array_record-{shard:05d}-of-{shards:05d}"
            write_shard(path, [msgpack.packb({"image": grey_png(number)})])
    names = [f"1*array_record:{tmp_path}/{number}.array_record@{shards}" for number in range(50)]
    one = open_source("mix:" + names[0])
    one[0]
    array_record._reader.cache_clear()
    threads, files = (len(os.listdir(f"/proc/self/{kind}")) for kind in ("task", "fd"))
    source = open_source("mix:" + "+".join(names))
    assert len(source) == 50 * shards
    # Other threads of the test process may come and go; 50 sources would show.
    assert len(os.listdir("/proc/self/fd")) <= files + 5
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: int(source[i]["image"][0, 0, 0]), range(len(source))))
    assert collections.Counter(found) == dict.fromkeys(range(50), shards)
    assert len(os.listdir("/proc/self/fd")) <= files + 5 + array_record.MAX_OPEN_SHARDS
    assert len(os.listdir("/proc/self/task")) <= threads + 5
    assert len(pickle.dumps(source)) < 100_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"'' in the mixture has no share; write mix:0\.7\*folder:/a\+0\.3\*tfds:x"),
        ("embedded", r"'embedded' in the mixture has no share"),
        ("0.5*embedded+embedded", r"unknown data source 'embedded\+embedded'"),
        ("x*embedded", r"the share 'x' of 'embedded' is not a number; write for example 0\.3"),
        ("1/0*embedded", r"the share '1/0' of 'embedded' is not a number"),
        ("0*embedded", r"the share of 'embedded:train' is 0, but must be above 0"),
        ("-1*embedded+1*embedded", r"the share of 'embedded:train' is -1"),
        ("0*embedded+0*embedded", r"the share of 'embedded:train' is 0"),
        ("1*embeded", r"source 1 of the mixture, 'embeded': unknown data source .*Did you mean"),
        ("1*mix:x.json", r"source 1 of the mixture is a mixture itself: mix:x\.json"),
        ("1*embedded|train[:x]", r"source 1 .*the bound 'x' is neither an integer"),
    ],
)
def test_a_mixture_that_is_not_understood_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(f"mix:{text}")


def test_missing_data_name_their_source(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"source 2 of the mixture, 'folder:.*not exist"):
        open_source(f"mix:1*embedded+1*folder:{tmp_path}/nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no mixture file 'nowhere\.json'"):
        open_source("mix:nowhere.json")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"sources": [{"source": "embedded"}]}', '{"sources": ["embedded"]}'],
)
def test_a_file_that_is_no_mixture_is_an_error(tmp_path: pathlib.Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r'x\.json is not a mixture .*; write \{"sources"'):
        open_source(f"mix:{tmp_path}/x.json")


def test_a_file_of_no_sources_or_bad_shares_is_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x.json").write_text('{"sources": []}')
    with pytest.raises(ValueError, match="0 sources and 0 shares"):
        open_source(f"mix:{tmp_path}/x.json")
    (tmp_path / "x.json").write_text('{"sources": [{"source": "embedded", "share": "much"}]}')
    with pytest.raises(ValueError, match="the share 'much' of 'embedded' is not a number"):
        open_source(f"mix:{tmp_path}/x.json")


def test_a_mixture_cannot_be_sliced() -> None:
    with pytest.raises(ValueError, match=re.escape("split 'train[:90%]': a mixture cannot be")):
        open_source("mix:1*embedded", "train[:90%]")


def test_an_empty_source_is_an_error() -> None:
    with pytest.raises(ValueError, match="a has no examples, so it cannot have a share"):
        MixtureSource("mix", [numbered("a", 0)], [Fraction(1)])
