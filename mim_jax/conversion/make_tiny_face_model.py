"""Train the tiny face model that comes with the package: an IResNet on procedural faces.

    python -m mim_jax.conversion.make_tiny_face_model [folder]

writes it to `folder` (default: `assets/` beside this file) in the names of InsightFace's code, as
float16, and prints how well it verifies people that it never saw. It takes a few minutes on two
cores.
"""

import pathlib
import sys

import numpy as np

from mim_jax.conversion.files import write_state_dict
from mim_jax.data import open_source
from mim_jax.evaluation.face_recognition import TINY_FACE_MODEL, face_vectors, train_face_model
from mim_jax.evaluation.verification import PAIRS, label_pairs, verification_scores
from mim_jax.layout.vec2face import iresnet_layout

SOURCE = "synthetic:faces"
KEYS = ("image", "label")


def main(arguments: list[str]) -> None:
    """Write the face model and print its scores."""
    folder = pathlib.Path(arguments[0]) if arguments else pathlib.Path(__file__).parent / "assets"
    output = folder / "tiny_face_model.safetensors"
    train, test = (open_source(SOURCE, split) for split in ("train", "test"))
    images, labels = (np.array([train[i][key] for i in range(len(train))]) for key in KEYS)
    variables = train_face_model(TINY_FACE_MODEL, images, labels)
    state = iresnet_layout(TINY_FACE_MODEL).save(variables)
    # Half precision halves the file.
    write_state_dict(output, {key: _half(value) for key, value in state.items()})
    images, labels = (np.array([test[i][key] for i in range(len(test))]) for key in KEYS)
    pairs, same = label_pairs(labels, PAIRS)
    scores = verification_scores(face_vectors(TINY_FACE_MODEL, variables, images), pairs, same)
    print(f"{output}: {output.stat().st_size:,} bytes, accuracy {scores['accuracy']:.1%}")


def _half(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float16) if value.dtype == np.float32 else value


if __name__ == "__main__":
    main(sys.argv[1:])
