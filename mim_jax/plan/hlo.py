"""What one device does in a step: matrix products and collectives, from the text of an XLA program.

The text is the program after partitioning: shapes are those of one device, and types those that
the accelerator will see (the CPU's own passes would turn bfloat16 into float32 later).
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*)\[([\d,]*)\]")
_RESHAPING = ("reshape", "transpose", "convert", "copy", "bitcast")


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution.

    Attributes:
        flops: operations, two for each multiplication and addition.
        bytes: of its operands and its result.
        count: times a step.
    """

    flops: float
    bytes: int
    count: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication between devices.

    Attributes:
        kind: one of `COLLECTIVES`.
        bytes: of the whole array that one device gathers, reduces, or sends.
        axes: of the mesh, over which devices take part.
        count: times a step.
        shape: of the array.
        where: the part of the model that it belongs to.
    """

    kind: str
    bytes: int
    axes: tuple[str, ...]
    count: int
    shape: str
    where: str


@dataclasses.dataclass(frozen=True)
class Work:
    """All of a step that counts.

    Attributes:
        products: matrix products.
        collectives: communication.
        unknown_loops: loops of unknown length with any of these, which count once.
    """

    products: tuple[Product, ...] = ()
    collectives: tuple[Collective, ...] = ()
    unknown_loops: int = 0

    @property
    def flops(self) -> float:
        """Operations of a device in a step."""
        return sum(product.flops * product.count for product in self.products)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.collectives + other.collectives,
            self.unknown_loops + other.unknown_loops,
        )

    def times(self, count: int) -> "Work":
        """The same work several times."""

        def more(item):
            return dataclasses.replace(item, count=item.count * count)

        return Work(
            tuple(map(more, self.products)), tuple(map(more, self.collectives)), self.unknown_loops
        )


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


def read_work(text: str, mesh: Mapping[str, int]) -> Work:
    """The work of one device.

    Args:
        text: of an HLO module after SPMD partitioning.
        mesh: devices along each axis, in the order of the partitions.
    """
    computations: dict[str, list[_Instruction]] = {}
    entry = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            computations[name] = current = []
            entry = name if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            inside = found[4].partition(")")[0]
            operands = tuple(re.findall(r"%([\w.\-]+)", inside))
            current.append(_Instruction(found[1], found[2], found[3], operands, found[4]))
    return _Reader(computations, mesh).work(entry)


class _Reader:
    def __init__(
        self, computations: dict[str, list[_Instruction]], mesh: Mapping[str, int]
    ) -> None:
        self.computations = computations
        self.mesh = mesh
        self.shapes = {i.name: i.shape for body in computations.values() for i in body}
        self.known: dict[str, Work] = {}

    def work(self, name: str) -> Work:
        """Of one computation, with all that it calls."""
        if name not in self.known:
            body = self.computations[name]
            users = collections.defaultdict(list)
            for instruction, operand in ((i, o) for i in body for o in i.operands):
                users[operand].append(instruction)
            self.known[name] = sum((self.of(i, users) for i in body), Work())
        return self.known[name]

    def of(self, instruction: _Instruction, users: Mapping[str, list[_Instruction]]) -> Work:
        opcode, rest = instruction.opcode, instruction.rest
        if opcode == "while":
            trips = self.trips(instruction)
            body = self.work(_called(rest, "body")[0]).times(trips or 1)
            counts = trips or not (body.products or body.collectives)
            return body if counts else dataclasses.replace(body, unknown_loops=1)
        if opcode == "conditional":
            branches = _called(rest, "branch_computations", "true_computation", "false_computation")
            return max(map(self.work, branches), key=lambda work: work.flops)
        if opcode in ("call", "fusion"):
            return self.work(_called(rest, "to_apply", "calls")[0])
        if opcode in ("dot", "convolution"):
            size = _bytes(instruction.shape) + sum(
                _bytes(self.shapes[operand]) for operand in instruction.operands
            )
            return Work(products=(Product(self.flops(instruction), size, 1),))
        if opcode in COLLECTIVES:
            return Work(collectives=(self.collective(instruction, users),))
        return Work()

    def trips(self, loop: _Instruction) -> int:
        """How often a loop runs: JAX counts from 0 up to a constant."""
        condition = self.computations[_called(loop.rest, "condition")[0]]
        limits = [
            int(i.rest.partition(")")[0])
            for i in condition
            if i.opcode == "constant" and i.shape.startswith("s32[]")
        ]
        compares = any(i.opcode == "compare" and "direction=LT" in i.rest for i in condition)
        return limits[0] if compares and len(limits) == 1 else 0

    def flops(self, product: _Instruction) -> float:
        outputs = math.prod(_dimensions(product.shape))
        left, right = (_dimensions(self.shapes[operand]) for operand in product.operands)
        if product.opcode == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.rest)
            contracted = [int(axis) for axis in axes[1].split(",") if axis] if axes else []
            return 2.0 * outputs * math.prod(left[axis] for axis in contracted)
        labels = re.search(r"dim_labels=\w+_(\w+)->", product.rest)
        out_axis = labels[1].index("o") if labels else -1
        return 2.0 * outputs * math.prod(right) / right[out_axis]

    def collective(
        self, instruction: _Instruction, users: Mapping[str, list[_Instruction]]
    ) -> Collective:
        kind, rest = instruction.opcode, instruction.rest
        axes = _axes(rest, self.mesh)
        size = math.prod(self.mesh[axis] for axis in axes)
        given = instruction.operands[0]
        shape = self.shapes[given] if kind == "reduce-scatter" else instruction.shape
        if kind == "all-reduce" and _is_cut(instruction, users, size):
            kind = "reduce-scatter"  # as GPU and TPU will run it
        name = re.search(r'op_name="([^"]*)"', rest)
        return Collective(
            kind, _bytes(shape), axes, 1, re.sub(r"\{[^}]*\}", "", shape), _where(name)
        )


def _is_cut(
    instruction: _Instruction, users: Mapping[str, list[_Instruction]], pieces: int
) -> bool:
    """Whether of a sum each device only uses its own piece."""
    size = math.prod(_dimensions(instruction.shape))

    def cuts(user: _Instruction) -> bool:
        if user.opcode in _RESHAPING:
            return bool(users.get(user.name)) and all(map(cuts, users[user.name]))
        return (
            user.opcode == "dynamic-slice" and math.prod(_dimensions(user.shape)) <= size / pieces
        )

    found = users.get(instruction.name, [])
    return pieces > 1 and bool(found) and all(map(cuts, found))


def _called(rest: str, *attributes: str) -> list[str]:
    """Names of computations among the attributes of an instruction."""
    found = re.findall(rf"(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%[\w.\-]+)", rest)
    return re.findall(r"%([\w.\-]+)", " ".join(found))


def _dimensions(shape: str) -> list[int]:
    """Of the first array of a shape."""
    found = _ARRAY.search(shape)
    return [int(size) for size in found[2].split(",") if size] if found else []


def _bytes(shape: str) -> int:
    """Of all arrays of a shape."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def _axes(rest: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of the mesh over which the devices of a group differ."""
    groups = _groups(rest, math.prod(mesh.values()))
    different = set()
    for group in groups:
        for axis, positions in zip(mesh, np.unravel_index(group, tuple(mesh.values()))):
            if len(set(positions.tolist())) > 1:
                different.add(axis)
    return tuple(axis for axis in mesh if axis in different)


def _groups(rest: str, devices: int) -> Iterator[Sequence[int]]:
    """Devices that take part together: one group for many, or pairs of sender and receiver."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        yield from _listed(pairs[1])
    elif named := re.search(r"replica_groups=mesh\[(.*?)\](.*?) \{(.*?)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = _iota(named[2], devices).reshape(tuple(sizes.values()))
        # A part of an axis, 'x':(2)4, is four neighbours at a distance of the rest.
        index: list[slice | int] = [0] * len(sizes)
        for name, _, before, part in re.findall(r"'(\w+)'(:\((\d+)\)(\d+))?", named[3]):
            step = sizes[name] // (int(before) * int(part)) if part else 1
            stop = step * int(part) if part else sizes[name]
            index[list(sizes).index(name)] = slice(0, stop, step)
        yield order[tuple(index)].reshape(-1).tolist()
    elif counted := re.search(
        r"replica_groups=\[(\d+),(\d+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", rest
    ):
        yield _iota(counted[3], devices).reshape(-1, int(counted[2]))[0].tolist()
    elif listed := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        yield next(iter(_listed(listed[1])))
    else:
        yield range(devices)


def _listed(text: str) -> Iterator[list[int]]:
    for group in re.findall(r"[\d,]+", text.replace("},{", ";").replace("{", "")):
        yield [int(device) for device in group.split(",") if device]


def _iota(text: str, devices: int) -> np.ndarray:
    """Devices in the order of `[2,4]T(1,0)`: as counted on axes that change places then."""
    found = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    order = np.arange(devices)
    if found:
        order = order.reshape([int(size) for size in found[1].split(",")])
        if found[2]:
            order = order.transpose([int(axis) for axis in found[2].split(",")])
    return order


def _where(name: re.Match[str] | None) -> str:
    """`jit(step)/transpose(jvp(Model))/encoder/while/body/blocks/mlp` -> `backward encoder/...`."""
    if name is None:
        return ""
    parts = name[1].split("/")
    direction = "backward" if any(part.startswith("transpose(jvp") for part in parts) else "forward"
    if not any("jvp" in part for part in parts):
        direction = ""
    skip = re.compile(r"jit\(|transpose\(|jvp\(|while$|body$|closed_call$|checkpoint$|.*\.body$")
    kept = [part for part in parts if not skip.match(part)]
    return " ".join(filter(None, (direction, "/".join(dict.fromkeys(kept)))))
