import pytest

from mim_jax.data.splits import slice_of, split_name_and_bounds


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:90%]", range(0, 90)),
        ("train[90%:]", range(90, 100)),
        ("train[10:20]", range(10, 20)),
        ("train[-10%:]", range(90, 100)),
        ("train[-5:]", range(95, 100)),
        ("train[:]", range(0, 100)),
        ("train[50:1000]", range(50, 100)),
        ("test[ 25% : 75% ]", range(25, 75)),
    ],
)
def test_slice_selects(split: str, expected: range) -> None:
    _, bounds = split_name_and_bounds(split)
    assert bounds is not None
    assert slice_of(split, bounds, 100) == expected


def test_name_without_slice() -> None:
    assert split_name_and_bounds("validation") == ("validation", None)


@pytest.mark.parametrize("length", [1, 7, 33, 101])
def test_two_sides_of_a_percentage_share_nothing_and_miss_nothing(length: int) -> None:
    below = range(length)[: slice_of("t", ("", "50%"), length).stop] if length > 1 else range(0)
    above = slice_of("t", ("50%", ""), length)
    assert [*below, *above] == list(range(length))


@pytest.mark.parametrize("split", ["", "train[", "train[1]", "train+test", "train[1:2:3]", "a b"])
def test_malformed_split_is_an_error(split: str) -> None:
    with pytest.raises(ValueError, match="is not understood; write a name with an optional slice"):
        split_name_and_bounds(split)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (("x", ""), "the bound 'x' is neither an integer nor a percentage"),
        (("", "120%"), "120% is not between -100% and 100%"),
        (("60", "40"), "selects none of the 100 examples"),
    ],
)
def test_bad_bounds_are_errors(bounds: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slice_of("train[...]", bounds, 100)
