"""Small tables with images for the tests."""

import pathlib

import numpy as np
import pandas as pd
from PIL import Image

COLORS = ("blue", "green", "red")


def frame_of_cars(rows: int = 12, seed: int = 0) -> pd.DataFrame:
    """Return a table with categories of text and of whole numbers, numbers, and a class `model`."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "image": [f"pictures/{row:03d}.png" for row in range(rows)],
            "price": np.round(rng.normal(9000, 2000, rows), 2),
            "color": [COLORS[row % 3] for row in range(rows)],
            "doors": [3 + 2 * (row % 2) for row in range(rows)],
            "model": [("fast", "slow")[row % 2] for row in range(rows)],
            "miles": rng.permutation(rows * 10)[:rows] * 100 + 0.5,
        }
    )


def write_pictures(folder: pathlib.Path, rows: int) -> None:
    """Write the images that `frame_of_cars` names; image i is filled with the value 5 * i."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for row in range(rows):
        values = np.full((8 + row % 3, 10, 3), (5 * row) % 256, np.uint8)
        Image.fromarray(values).save(folder / "pictures" / f"{row:03d}.png")


def write_cars(folder: pathlib.Path, rows: int = 12, name: str = "cars.csv") -> pathlib.Path:
    """Write a table with its images, with `pictures/` beside it."""
    write_pictures(folder, rows)
    path = folder / name
    write_table(frame_of_cars(rows), path)
    return path


def write_table(frame: pd.DataFrame, path: pathlib.Path) -> None:
    """Write CSV or Parquet by the suffix."""
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
