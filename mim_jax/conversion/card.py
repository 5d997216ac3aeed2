"""The model card beside exported weights: what is in them, how to load them, what was checked."""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mim_jax.conversion.formats import Format, Model, preprocessing
from mim_jax.training.versions import versions

FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: {task}
tags: [masked-image-modeling, {method}]
---

"""
"""What the Hugging Face hub reads from a model folder's card."""


def card_path(output: Path) -> Path:
    """`README.md` in a folder, and `NAME.md` beside a file."""
    return output / "README.md" if output.is_dir() else output.with_suffix(".md")


def model_card(
    kind: Format,
    model: Model,
    output: Path,
    *,
    step: int | None,
    held: Iterable[str],
    notes: Iterable[str],
) -> str:
    """The card as Markdown.

    Args:
        kind: format of the output.
        model: what was exported.
        output: where it was written.
        step: of the checkpoint, None if unknown.
        held: paths of the parameters in the output.
        notes: what was left out, and the results of the checks.
    """
    lines = [
        f"# {model.config.method}: weights for {kind.reader}",
        "",
        _paper(model),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(model, step, set(held)).items()),
        "",
        "```python",
        kind.usage(output),
        "```",
        "",
        *(f"- {note}" for note in notes),
        f"- Written with {', '.join(f'{name} {value}' for name, value in versions().items())}.",
        "",
    ]
    text = "\n".join(lines)
    if not output.is_dir():
        return text
    task = "image-classification" if kind.name == "hf-classifier" else "image-feature-extraction"
    return FRONT_MATTER.format(task=task, method=model.config.method) + text


def _paper(model: Model) -> str:
    """The first line of the method's file, which names its paper."""
    text = sys.modules[type(model.method).__module__].__doc__ or type(model.method).__name__
    return text.splitlines()[0]


def _facts(model: Model, step: int | None, held: set[str]) -> dict[str, str]:
    """What the card lists, by name."""
    config, given = model.config, preprocessing(model)
    data, encoder = config.data, model.method.encoder
    facts = {}
    if encoder is not None:
        blocks = encoder.transformer
        kind = "learned" if encoder.learned_positions else "fixed sine-cosine table"
        facts["encoder"] = (
            f"ViT, width {encoder.width}, {blocks.depth} blocks, {blocks.heads} heads, patches of "
            f"{_times(encoder.patch_size)}; positions: {kind}"
        )
    sides = _times(given["image_size"])
    plural = "" if given["channels"] == 1 else "s"
    facts["image"] = f"{sides} pixels (height x width), {given['channels']} channel{plural}"
    facts["normalization"] = (
        f"samples / {given['largest']}, minus mean {_list(given['mean'])}, divided by "
        f"{_list(given['std'])}"
    )
    facts["crop in evaluation"] = f"centre, {config.evaluate.crop_ratio:g} of the short side"
    length = f"{config.steps} steps" if config.steps else f"{config.epochs:g} epochs"
    facts["training config"] = (
        f"data {data.source} ({data.split}), {length}, batch size {config.batch_size}, "
        f"{config.optimizer.name}"
    )
    if config.init_from:
        facts["started from"] = config.init_from
    if step is not None:
        facts["checkpoint"] = f"step {step}"
    parts = sorted({path.partition("/")[0] for path in held})
    numbers = sum(int(np.size(model.params[path])) for path in held)
    facts["in the file"] = f"{', '.join(parts)}: {numbers:,} parameters"
    return facts


def _times(sides: Iterable[int]) -> str:
    return " x ".join(map(str, sides))


def _list(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
