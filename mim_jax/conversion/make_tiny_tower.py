"""Train the tiny tower that comes with the package: a supervised ViT on the embedded images.

    python -m mim_jax.conversion.make_tiny_tower [folder]

writes it to `folder` (default: `assets/` beside this file) in timm's naming, as float16, with its
sizes in a JSON file beside it, and prints its accuracy on the embedded test split. It takes a few
minutes on two cores.
"""

import pathlib
import sys
import tempfile

import numpy as np

from mim_jax import config as configs
from mim_jax.conversion.card import card_path
from mim_jax.conversion.files import read_state_dict, write_state_dict
from mim_jax.conversion.official import export_run
from mim_jax.models.tower import TOWERS
from mim_jax.training.loop import train

SIZES = ("width", "depth", "heads")

EPOCHS = 100.0


def trained(folder: pathlib.Path) -> dict[str, float]:
    """Trains in `folder`, and returns the scores on the test split."""
    config = configs.load("finetune:tiny")
    config.model.update({name: TOWERS["tiny"][name] for name in SIZES})
    # From scratch, so all layers learn at one rate; the class token is what represents an image.
    config.model.update(pool="cls", layer_decay=1.0, drop_path=0.1, mixup=0.2)
    config.epochs = EPOCHS
    config.optimizer.base_lr = 4e-3
    config.schedule.warmup_epochs = 5.0
    config.log.update(every_steps=500, tensorboard=False)
    config.checkpoint.every_steps = 10**6
    return train(config, folder).evaluation["trained"]


def main(arguments: list[str]) -> None:
    """Write the tower and print its scores."""
    folder = pathlib.Path(arguments[0]) if arguments else pathlib.Path(__file__).parent / "assets"
    output = folder / "tiny_tower.safetensors"
    with tempfile.TemporaryDirectory() as run:
        scores = trained(pathlib.Path(run))
        export_run(pathlib.Path(run), output, "timm")
    card_path(output).unlink()  # the folder has a text of its own
    # Half precision halves the file, and changes no more than the fourth digit of a feature.
    state = {key: value.astype(np.float16) for key, value in read_state_dict(output).items()}
    write_state_dict(output, state)
    print(f"{output}: {output.stat().st_size:,} bytes, top-1 {scores['classification/top1']:.1%}")


if __name__ == "__main__":
    main(sys.argv[1:])
