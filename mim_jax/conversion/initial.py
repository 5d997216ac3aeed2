"""Starts a run from given weights: `config.init_from`."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mim_jax import config as configs
from mim_jax.conversion.weights import read_weights
from mim_jax.method import Method, method_class, variable_shapes
from mim_jax.training.checkpoints import is_run, read_variables
from mim_jax.training.state import TrainState, start_ema
from mim_jax.training.tree import differences, flatten, unflatten

BATCH_STATISTICS = "batch_stats"
"""The collection that belongs to the parameters of the same modules."""

MOST_NAMES = 8
"""Of more arrays a note tells the modules only."""


@dataclasses.dataclass(frozen=True)
class Donor:
    """Weights to start from, with the model that they belong to.

    Attributes:
        path: where they were read.
        method: the model, of the sizes that the weights have.
        variables: NumPy arrays by path, such as `params/encoder/cls_token`.
        left_out: names in a file that the method has no place for.
        notes: for the user, on the file.
    """

    path: str
    method: Method
    variables: dict[str, np.ndarray]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_donor(path: str, method: Method) -> Donor:
    """Weights from a checkpoint file, a model folder of Hugging Face, or a run of ours.

    Args:
        path: a file or folder that `read_weights` knows, or the folder of a run.
        method: what will be trained. A file is read by its layout; a run tells its own method.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if a file is of another kind or holds another model; says all that differs.
    """
    if not is_run(path):
        return _donor_from_weights(path, method)
    variables, about = read_variables(path)
    config = configs.resolve(configs.from_json(about["config"]), "cpu")
    return Donor(path, method_class(about["method"]).build(config), flatten(variables))


def _donor_from_weights(path: str, method: Method) -> Donor:
    layout = method.layout()
    if layout is None:
        raise ValueError(f"{type(method).__name__} has no official checkpoint to read {path} by.")
    weights = read_weights(path)
    state = weights.state
    try:
        method = method.sized_like(state, weights.sizes)
        layout = method.layout()
        assert layout is not None
        loaded = layout.load(state, layout.joined(variable_shapes(method)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    left_out = tuple(layout.left_out(state))
    return Donor(path, method, flatten(layout.parted(loaded)), left_out, weights.notes)


def initialize_from(path: str, method: Method, state: TrainState) -> tuple[TrainState, list[str]]:
    """Puts weights from a file, or from a run of ours, into a new state.

    The weights of another method give what both have, such as the encoder. Weights for another
    image size, patch size or number of channels are resized, see `Method.adopt`.

    Args:
        path: see `read_donor`.
        method: the method that will be trained.
        state: at step 0; parameters that the weights lack stay as they are.

    Returns:
        The state, laid out as before, and notes for the user on every array that was resized,
        was not used, or is not there.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if the weights do not fit; everything that does not is listed.
    """
    donor = read_donor(path, method)
    old = flatten(state.variables)
    new, unused = _adopted(donor, method, sorted(old))
    problems = differences(new, {name: old[name] for name in new}, f"{path}, resized")
    problems += _of_another_depth(set(old) - set(new), unused, donor, old)
    if not new:
        problems.append(f"{type(donor.method).__name__} shares no part with the model")
    if problems:
        raise ValueError(
            f"the weights of {path} do not fit the model:\n  " + "\n  ".join(problems) + "\n"
            "Set the fields of config.model to the sizes of the weights."
        )
    placed = {name: jax.device_put(value, old[name].sharding) for name, value in new.items()}
    kept = sorted(name.removeprefix("params/") for name in set(old) - set(new))
    elsewhere = tuple(f"{part.target}/" for part in method.pretrained if part.path)
    fresh = [name for name in kept if not name.startswith(elsewhere)]
    variables = unflatten({**old, **placed})
    # An EMA target that the weights lack starts from its source, as in a new run.
    absent = [e for e in method.ema if any(name.startswith(f"{e.target}/") for name in kept)]
    params = start_ema(absent, variables.pop("params"))
    notes = [f"initialized {len(new)} of {len(old)} arrays from {path}", *donor.notes]
    for name, value in new.items():
        given = donor.variables.get(name)
        if given is not None and given.shape != value.shape:
            notes.append(
                f"resized {name.removeprefix('params/')} from {given.shape} to {value.shape}"
            )
    left_out = [name.removeprefix("params/") for name in unused] + list(donor.left_out)
    if left_out:
        notes.append(f"not used by this model: {_told(left_out)}")
    if fresh:
        notes.append(f"not in the weights, so at their initial values: {_told(fresh)}")
    return dataclasses.replace(state, params=params, mutable=variables), notes


def _told(names: Sequence[str]) -> str:
    """The names of arrays; of many, the modules that hold them, with numbers of arrays."""
    if len(names) <= MOST_NAMES:
        return ", ".join(names)
    modules = collections.Counter("/".join(name.split("/")[:2]) for name in names)
    return ", ".join(
        f"{module} ({count} arrays)" if count > 1 else module for module, count in modules.items()
    )


class _Recorded(dict[str, np.ndarray]):
    """A dictionary that knows which of its entries were read."""

    def __init__(self, entries: Mapping[str, np.ndarray]) -> None:
        super().__init__(entries)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As `dict.get`."""
        self.read.add(name)
        return super().get(name, default)


def _adopted(
    donor: Donor, method: Method, names: Iterable[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What a method takes over from a donor, by path, and the names that it did not use."""
    start = "params/"
    params = _Recorded(
        {k.removeprefix(start): v for k, v in donor.variables.items() if k.startswith(start)}
    )
    same = type(donor.method) is type(method)
    found: dict[str, np.ndarray] = {}
    used = set()
    # Parameters first, since batch statistics go with those of the same module.
    for name in sorted(names, key=lambda name: not name.startswith(start)):
        if name.startswith(start):
            value = method.adopt(name.removeprefix(start), params, donor.method)
        else:
            collection, _, path = name.partition("/")
            module = f"{start}{path.rpartition('/')[0]}/"
            shared = collection == BATCH_STATISTICS and any(x.startswith(module) for x in found)
            value = donor.variables.get(name) if same or shared else None
            used.add(name)
        if value is not None:
            found[name] = value
    used |= {start + name for name in params.read}
    return found, sorted(set(donor.variables) - used)


def _of_another_depth(
    missing: Iterable[str], unused: Iterable[str], donor: Donor, wanted: Iterable[str]
) -> list[str]:
    """Blocks that only one side has, in a stack that both have."""

    def stacks(names: Iterable[str]) -> set[str]:
        return {name.partition("/blocks")[0] for name in names if "/blocks" in name}

    shared = stacks(donor.variables) & stacks(wanted)

    def in_shared(names: Iterable[str]) -> list[str]:
        return [name for name in sorted(names) if stacks([name]) & shared]

    return [
        *(f"missing: {name}" for name in in_shared(missing)),
        *(f"unexpected: {name}" for name in in_shared(unused)),
    ]
