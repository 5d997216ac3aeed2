import numpy as np
import pandas as pd
import pytest

from mim_jax import cli
from mim_jax.data.table_schema import (
    Column,
    Schema,
    encoded,
    encoded_labels,
    infer_schema,
    read_schema,
    write_schema,
)
from tests.data.tables import write_cars

FRUIT = Column("fruit", "categorical", ("apple", "pear"))
WEIGHT = Column("weight", "numerical", (), 2.0, 4.0)
DOORS = Column("doors", "categorical", (3, 5))


def inferred(values: object, label: bool = False) -> Column:
    frame = pd.DataFrame({"x": values, "y": range(len(values))})
    if label:
        schema = infer_schema(frame, ["y"], "x", "a.csv")
        assert schema.label is not None
        return schema.label
    return infer_schema(frame, ["x"], None, "a.csv").columns[0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["b", "a", None, "b"], ("a", "b")),
        ([True, False, True], ("False", "True")),
        ([True, None, False], ("False", "True")),
        (["True", "False"], ("False", "True")),
        ([10, 9, 10], (9, 10)),
        (["10", "9", None], (9, 10)),
        ([2.0, 1.0, np.nan], (1, 2)),
        (list(range(20)), tuple(range(20))),
        (["1", "2", "many"], ("1", "2", "many")),
        (pd.Series([1, 2, None], dtype="Int8"), (1, 2)),
    ],
    ids=str,
)
def test_text_truth_values_and_few_whole_numbers_are_categories(values, expected):
    column = inferred(values)
    assert column.kind == "categorical" and column.values == expected
    assert {type(value) for value in column.values} == {type(expected[0])}


@pytest.mark.parametrize(
    "values",
    [[0.5, 1.0, 2.0], list(range(21)), ["0.5", "1e3", None], [0.1] * 3],
    ids=str,
)
def test_other_numbers_are_numerical_with_mean_and_deviation(values):
    column = inferred(values)
    numbers = np.array([float(v) for v in values if v is not None])
    assert column.kind == "numerical" and column.mean == pytest.approx(numbers.mean())
    # A column whose values are all the same has no deviation to divide by.
    constant = len(set(numbers)) == 1
    assert column.std == pytest.approx(1.0 if constant else numbers.std())


def test_labels_are_categories_however_many_numbers_they_are():
    assert inferred(list(range(500)), label=True).values == tuple(range(500))
    assert inferred(["b", "a", "b"], label=True).values == ("a", "b")
    assert inferred([1.5, 2.5], label=True).values == ("1.5", "2.5")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([None, None], r"a\.csv: column 'x' has no value in any row.*\?ignore=x"),
        (pd.to_datetime(["2020-01-01", "2021-01-01"]), "of the type datetime64.* nor text"),
        ([["a"], ["b"]], r"of the type object, such as \['a'\], neither numbers nor text"),
        ([f"advert {i}" for i in range(1001)], r"has 1001 different texts.*\?ignore=x"),
        ([*map(str, range(30)), "x"], r"row 31 .*column 'x' is 'x', but most .*are numbers"),
        (["0.5", "inf"], r"row 2 .*is 'inf', but the column is numerical; write a finite number"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:30],
)
def test_columns_of_other_kinds_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        inferred(values)


def test_categorical_columns_come_first_in_the_order_of_the_table():
    columns = (WEIGHT, FRUIT, Column("length", "numerical"), DOORS)
    schema = Schema(columns)
    assert schema.names == ("fruit", "doors", "weight", "length")
    assert (schema.category_counts, schema.num_continuous) == ((2, 2), 2)


def test_numbers_and_texts_are_found_whatever_their_type():
    schema = Schema((FRUIT, DOORS, WEIGHT))
    frames = [
        pd.DataFrame({"weight": ["6", "2"], "doors": ["5", "3.0"], "fruit": ["pear", "apple"]}),
        pd.DataFrame({"weight": [6.0, 2.0], "doors": [5.0, 3.0], "fruit": ["pear", "apple"]}),
        pd.DataFrame({"weight": [6, 2], "doors": pd.array([5, 3]), "fruit": ["pear", "apple"]}),
    ]
    for frame in frames:
        table, missing = encoded(frame, schema, "a.csv")
        assert table.tolist() == [[1, 1, 1], [0, 0, 0]] and not missing.any()


def test_text_that_looks_like_numbers_stays_text_where_the_schema_has_text():
    zip_code = Schema((Column("zip", "categorical", ("01", "1")),))
    frame = pd.DataFrame({"zip": ["1", "01"]}, dtype=str)
    assert encoded(frame, zip_code, "a.csv")[0].tolist() == [[1], [0]]


def test_whole_columns_may_be_empty():
    frame = pd.DataFrame({"fruit": [None, None], "doors": [np.nan] * 2, "weight": [None, 4.0]})
    table, missing = encoded(frame, Schema((FRUIT, DOORS, WEIGHT)), "a.csv")
    assert missing.tolist() == [[True, True, True], [True, True, False]]
    assert table.tolist() == [[0, 0, 0], [0, 0, 0.5]]


def test_labels_are_codes():
    frame = pd.DataFrame({"doors": ["5", "3", "5"]})
    labels = encoded_labels(frame, DOORS, "a.csv")
    assert labels.tolist() == [1, 0, 1] and labels.dtype == np.int32


def test_a_schema_goes_through_its_file(tmp_path):
    label = Column("Größe", "categorical", ("größer", "kleiner"))
    for schema in (Schema((FRUIT, WEIGHT, DOORS), label), Schema((WEIGHT,))):
        write_schema(schema, tmp_path / "schema.json")
        assert read_schema(tmp_path / "schema.json") == schema
        assert [file.name for file in tmp_path.iterdir()] == ["schema.json"]
    assert "größer" in Schema((WEIGHT,), label).to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"mine\.json is no JSON"),
        ("[]", r"mine\.json is not understood"),
        ("{}", r"mine\.json is not understood \(KeyError: 'columns'\)"),
        ('{"columns": []}', "needs at least one column"),
        ('{"columns": [{"name": "x", "kind": "ordinal"}]}', "'ordinal'; known are 'categorical'"),
        ('{"columns": [{"name": "x", "kind": "numerical", "sd": 2}]}', "keyword argument 'sd'"),
        (
            '{"columns": [{"name": "x", "kind": "numerical", "std": 0}]}',
            "std above 0, got 0.0 and 0",
        ),
        ('{"columns": [{"name": "x", "kind": "categorical"}]}', "at least one, got"),
        (
            '{"columns": [{"name": "x", "kind": "categorical", "values": [1, "b"]}]}',
            "must be all text or all whole numbers",
        ),
        (
            '{"columns": [{"name": "x", "kind": "categorical", "values": ["b", "b"]}]}',
            "a value of the column 'x' occurs twice",
        ),
        (
            '{"columns": [{"name": "x", "kind": "numerical"}, {"name": "x", "kind": "numerical"}]}',
            "has the column 'x' twice",
        ),
        (
            '{"label": {"name": "y", "kind": "numerical"}, '
            '"columns": [{"name": "x", "kind": "numerical"}]}',
            "the label 'y' must be categorical",
        ),
    ],
)
def test_a_schema_that_is_not_understood_is_an_error(text, message):
    with pytest.raises(ValueError, match=message) as error:
        Schema.from_json(text, "mine.json")
    assert str(error.value).startswith("mine.json")


def test_inspect_shows_and_writes_the_schema(tmp_path, capsys):
    path, file = write_cars(tmp_path), tmp_path / "written.json"
    source = f"table:{path}?label=model"
    assert cli.main(["data", "inspect", "--source", source, f"--schema={file}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "color │ categorical │ 3: blue, green, red │ 0.0%" in shown
    assert "doors │ categorical │ 2: 3, 5" in shown and "price │ numerical │" in shown
    assert read_schema(file).names == ("color", "doors", "price", "miles")


def test_inspect_writes_no_schema_of_images(tmp_path, capsys):
    assert cli.main(["data", "inspect", "--source=embedded", f"--schema={tmp_path}/x.json"]) != 0
    assert "--schema needs a table" in capsys.readouterr().err
