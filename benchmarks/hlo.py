"""What a compiled program's text says of its loop: its kernels, and the bytes that each reads and writes.

XLA counts nothing for programs of a GPU that is not there, so the text of the optimised program is read. A kernel reads
its operands and writes its result. Inside a fusion less may be read, where it slices or gathers, and less be written,
where it updates a part of an operand in place.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

_BITS = {"pred": 8, "bf16": 16} | {f"{kind}{size}": size for kind in "suf" for size in (8, 16, 32, 64)}
_ARRAY = re.compile(rf"\b({'|'.join(_BITS)})\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)$"
)
# What names or regroups arrays and runs nothing.
_NO_KERNELS = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"))
# Read of their first operand no more than they give.
_PARTS = frozenset(("slice", "dynamic-slice", "gather"))
# Write into their first operand no more than the operand of this number holds.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
_LEAST_COPY = 1 << 20


@dataclass(frozen=True)
class Instruction:
    """A line of a program.

    Attributes:
        name: what others call its result.
        shape: of the result, as HLO writes it.
        op: what is done.
        operands: names of what it is done to.
        rest: all else that the line says.
        is_root: whether its computation gives this result.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def called(self, attribute: str) -> str:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.rest)
        assert found is not None, f"{self.op} names its {attribute}"
        return found[1]


@dataclass(frozen=True)
class Kernel:
    """A kernel of a loop's body.

    Attributes:
        name: of its instruction.
        read: bytes.
        written: bytes.
        source: where the program asked for it, as JAX names the place; empty where XLA made it up.
        copies: whether it only copies, converts or transposes, and at least a mebibyte.
    """

    name: str
    read: int
    written: int
    source: str
    copies: bool


def loop_kernels(program: str) -> list[Kernel]:
    """The kernels of one turn of a program's largest loop, in order.

    Raises:
        ValueError: a program without a loop.
    """
    computations = _computations(program)
    bodies = [computations[one.called("body")] for lines in computations.values() for one in lines if one.op == "while"]
    return _kernels(max(bodies, key=len), computations)


def array_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple, of this HLO shape."""
    return sum(
        prod(map(int, filter(None, sizes.split(",")))) * _BITS[kind] // 8 for kind, sizes in _ARRAY.findall(shape)
    )


def _computations(program: str) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    own: list[Instruction] = []
    for line in program.splitlines():
        if head := _COMPUTATION.match(line):
            own = found[head["name"]] = []
        elif match := _INSTRUCTION.match(line):
            inside = _inside_brackets(match["rest"])
            operands = tuple(re.findall(r"%([\w.-]+)", inside))
            own.append(
                Instruction(match["name"], match["shape"], match["op"], operands, match["rest"], bool(match["root"]))
            )
    return found


def _inside_brackets(rest: str) -> str:
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:place]
    return rest


def _kernels(lines: Sequence[Instruction], computations: Mapping[str, list[Instruction]]) -> list[Kernel]:
    shapes = {one.name: one.shape for one in lines}
    found = []
    for one in lines:
        if one.op in _NO_KERNELS:
            continue
        if one.op in ("call", "conditional", "while"):
            # What runs inside takes part in the turn; both sides of a conditional are counted.
            inner = [name for name in re.findall(r"%([\w.-]+)", one.rest) if name in computations]
            found += [kernel for name in inner for kernel in _kernels(computations[name], computations)]
            continue
        found.append(_kernel(one, shapes, computations))
    return found


def _kernel(one: Instruction, shapes: Mapping[str, str], computations: Mapping[str, list[Instruction]]) -> Kernel:
    source = re.search(r'op_name="([^"]*)"', one.rest)
    if one.op == "fusion":
        lines = computations[one.called("calls")]
        read, written = sum(_read(lines)), _written(lines)
        copies = {line.op for line in lines} <= {*_NO_KERNELS, "copy", "convert", "transpose", "pad", "concatenate"}
    else:
        sizes = {name: array_bytes(shapes.get(name, "")) for name in one.operands}
        alone = [replace(one, is_root=True)]
        read, written = _of_operands(one, sizes), _written(alone, sizes)
        copies = one.op in ("copy", "convert", "transpose", "concatenate")
    return Kernel(one.name, read, written, source[1] if source else "", copies and written >= _LEAST_COPY)


def _of_operands(one: Instruction, sizes: Mapping[str, int]) -> int:
    if one.op in _PARTS:
        return array_bytes(one.shape)
    updated = one.operands[:1] if one.op in _UPDATES else ()
    return sum(size for name, size in sizes.items() if name not in updated)


def _read(lines: Sequence[Instruction]) -> list[int]:
    """Bytes that a fusion reads of each parameter: all, unless every use takes a part of it or updates it in place."""
    return [_used(one, lines) for one in lines if one.op == "parameter"]


def _used(one: Instruction, lines: Sequence[Instruction]) -> int:
    whole, taken = array_bytes(one.shape), 0
    for user in (line for line in lines if one.name in line.operands):
        first = user.operands[0] == one.name
        if user.op == "bitcast":
            taken += _used(user, lines)
        elif first and user.op in _PARTS:
            taken += array_bytes(user.shape)
        elif not (first and user.op in _UPDATES):
            return whole
    return min(taken, whole)


def _written(lines: Sequence[Instruction], sizes: Mapping[str, int] | None = None) -> int:
    """Bytes that a computation writes as its result."""
    by_name = {one.name: one for one in lines}

    def of(one: Instruction) -> int:
        if one.op == "tuple":
            return sum(of(by_name[name]) for name in one.operands)
        if one.op == "bitcast":
            return of(by_name[one.operands[0]]) if one.operands[0] in by_name else array_bytes(one.shape)
        if one.op in _UPDATES:
            update = one.operands[_UPDATES[one.op]]
            return array_bytes(by_name[update].shape) if update in by_name else (sizes or {}).get(update, 0)
        return array_bytes(one.shape)

    return of(next(one for one in lines if one.is_root))
