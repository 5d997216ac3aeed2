import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mim_jax.models.positions import resize_positions, sincos_positions


def plain_table(rows: int, columns: int, width: int) -> np.ndarray:
    """The table entry by entry: column first, then row; all sines, then all cosines."""
    table = []
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            entry = []
            for position in (column, row):
                angles = [position * 10000 ** (-k / quarter) for k in range(quarter)]
                entry += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            table.append(entry)
    return np.asarray(table, np.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([4, 8, 12, 48]), st.integers(0, 2))
def test_table_equals_a_plain_loop_with_zeros_for_leading_tokens(rows, columns, width, leading):
    table = sincos_positions((rows, columns), width, leading_tokens=leading)
    assert table.dtype == np.float32
    assert table.shape == (leading + rows * columns, width)
    np.testing.assert_array_equal(table[:leading], 0)
    np.testing.assert_allclose(table[leading:], plain_table(rows, columns, width), atol=1e-7)


def test_table_is_computed_in_float64():
    # In float32 the sine of an angle near 1000 is off by 3e-5.
    table = sincos_positions((1, 1001), 64)
    np.testing.assert_allclose(table, plain_table(1, 1001, 64), atol=1e-7)


def test_the_first_half_of_the_channels_encodes_the_column_and_the_second_the_row():
    table = sincos_positions((3, 5), 16).reshape(3, 5, 16)
    np.testing.assert_array_equal(table[:, :, :8], np.broadcast_to(table[:1, :, :8], (3, 5, 8)))
    np.testing.assert_array_equal(table[:, :, 8:], np.broadcast_to(table[:, :1, 8:], (3, 5, 8)))
    assert len(np.unique(table.reshape(15, 16), axis=0)) == 15


@pytest.mark.parametrize("width", [1, 2, 6, 49])
def test_a_width_not_divisible_by_four_is_an_error(width):
    with pytest.raises(ValueError, match=f"divisible by 4, got {width}"):
        sincos_positions((2, 2), width)


@settings(max_examples=25, deadline=None)
@given(*[st.integers(1, 9)] * 4)
def test_resizing_keeps_constants_and_leading_tokens(rows, columns, new_rows, new_columns):
    table = np.concatenate([np.full((1, 3), 7), np.full((rows * columns, 3), 2.5)])
    resized = resize_positions(table.astype(np.float32), (rows, columns), (new_rows, new_columns))
    assert resized.shape == (1 + new_rows * new_columns, 3)
    np.testing.assert_array_equal(resized[0], 7)
    np.testing.assert_allclose(resized[1:], 2.5, rtol=1e-6)


def test_resizing_is_that_of_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    table = np.random.default_rng(0).normal(size=(2 + 6 * 4, 5)).astype(np.float32)
    image = torch.from_numpy(table[2:].reshape(1, 6, 4, 5)).permute(0, 3, 1, 2)
    for new in ((7, 7), (3, 2), (6, 9), (1, 1)):
        wanted = torch.nn.functional.interpolate(image, size=new, mode="bicubic")
        wanted = wanted.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
        resized = resize_positions(table, (6, 4), new)
        np.testing.assert_allclose(resized[2:], wanted, atol=1e-5)


def test_a_table_that_is_too_short_for_its_grid_is_an_error():
    with pytest.raises(ValueError, match=r"table of 5 rows has no grid of \(2, 3\)"):
        resize_positions(np.zeros((5, 4)), (2, 3), (4, 4))
