"""What a compiled program's text says it does: its kernels, and the bytes of main memory that each reads and writes.

XLA counts nothing for programs of a GPU that is not there, and whole tables for a TPU, so the text of the optimised
program is read. A kernel reads its operands and writes its result. Inside a fusion less may be read, where it slices or
gathers, and less be written, where it updates a part of an operand in place.

Only main memory counts. A TPU program keeps some arrays in the chip's own memory, which their layouts tell by `S(n)`: a
weight that is fetched there ahead of its use is read by that transfer, and what then computes with it reads nothing.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

_BITS = {"pred": 8, "bf16": 16} | {f"{kind}{size}": size for kind in "suf" for size in (8, 16, 32, 64)}
_ARRAY = re.compile(rf"\b({'|'.join(_BITS)})\[([\d,]*)\](\{{[^}}]*\}})?")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)$"
)
# What names or regroups arrays and runs nothing.
_NO_KERNELS = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"))
# Runs other computations of the program.
_CALLS = frozenset(("call", "conditional", "while", "async"))
_COPIES = frozenset(("copy", "convert", "transpose", "pad", "concatenate"))
# Read of their first operand no more than they give.
_PARTS = frozenset(("slice", "dynamic-slice", "gather"))
# Write into their first operand no more than the operand of this number holds.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# Give an entry from the same entry of their operands, or from some entries that no other entry is given from.
_PART_BY_PART = frozenset(("bitcast", "reduce", "convert", "copy", "add", "subtract", "multiply", "divide", "maximum"))
_LEAST_COPY = 1 << 20
_ENTRY = "ENTRY"


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
        is_started: whether later lines run before it is done, and a line of its own waits for it.
    """

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool
    is_started: bool = False

    def called(self, attribute: str) -> str:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.rest)
        assert found is not None, f"{self.op} names its {attribute}"
        return found[1]


@dataclass(frozen=True)
class Kernel:
    """A kernel, or a transfer that runs beside the kernels.

    Attributes:
        name: of its instruction.
        read: bytes of main memory.
        written: bytes of main memory.
        source: where the program asked for it, as JAX names the place; empty where XLA made it up.
        copies: whether it only copies, converts or transposes, from main memory to main memory, at least a mebibyte.
        is_transfer: whether it runs beside kernels.
    """

    name: str
    read: int
    written: int
    source: str
    copies: bool
    is_transfer: bool = False


Computations = Mapping[str, list[Instruction]]


def loop_kernels(program: str) -> list[Kernel]:
    """The kernels and transfers of one turn of a program's largest loop, in order.

    Raises:
        ValueError: a program without a loop.
    """
    computations = _computations(program)
    bodies = [computations[one.called("body")] for lines in computations.values() for one in lines if one.op == "while"]
    return list(_kernels(max(bodies, key=len), computations))


def all_kernels(program: str) -> list[Kernel]:
    """The kernels and transfers of a whole program, in order; of a loop whose turns are not known, those of one."""
    computations = _computations(program)
    return list(_kernels(computations[_ENTRY], computations))


def array_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple, of this HLO shape."""
    return sum(_sizes(shape, anywhere=True))


def main_memory_bytes(shape: str) -> int:
    """The same, of the arrays that lie in main memory."""
    return sum(_sizes(shape, anywhere=False))


def _sizes(shape: str, *, anywhere: bool) -> Iterator[int]:
    for kind, sizes, layout in _ARRAY.findall(shape):
        if anywhere or not re.search(r"S\(\d", layout):
            yield prod(map(int, filter(None, sizes.split(",")))) * _BITS[kind] // 8


def _computations(program: str) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    own: list[Instruction] = []
    for line in program.splitlines():
        if head := _COMPUTATION.match(line):
            own = found[_ENTRY if head["entry"] else head["name"]] = []
        elif match := _INSTRUCTION.match(line):
            own.append(_instruction(match))
    return found


def _instruction(match: re.Match[str]) -> Instruction:
    op, shape = match["op"].removesuffix("-start"), match["shape"]
    is_started = op != match["op"]
    if is_started and op not in _CALLS:
        # What a copy gives comes first, before what it reads; with everything else that is started it is the reverse.
        shape = _parts(shape[1:])[0 if op == "copy" else 1]
    operands = tuple(re.findall(r"%([\w.-]+)", ",".join(_parts(match["rest"]))))
    return Instruction(match["name"], shape, op, operands, match["rest"], bool(match["root"]), is_started)


def _parts(inside: str) -> list[str]:
    """What stands between the outer commas of a text that follows an opening bracket, up to the closing one."""
    parts, depth = [""], 1
    for letter in inside:
        depth += (letter in "([{") - (letter in ")]}")
        if not depth:
            break
        if letter == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _kernels(lines: Sequence[Instruction], computations: Computations) -> Iterator[Kernel]:
    shapes = {one.name: one.shape for one in lines}
    for one in lines:
        if one.op in _CALLS:
            # What runs inside takes part; both sides of a conditional are counted.
            inner = [name for name in re.findall(r"%([\w.-]+)", one.rest) if name in computations]
            for name in inner * _turns(one):
                yield from _kernels(computations[name], computations)
        elif not _runs_nothing(one):
            yield _kernel(one, shapes, computations)


def _turns(one: Instruction) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.rest)
    return int(known[1]) if known else 1


def _runs_nothing(one: Instruction) -> bool:
    """Whether it only names or regroups arrays, or waits for what was started."""
    return one.op in _NO_KERNELS or one.op.endswith("-done") or 'custom_call_target="ConcatBitcast"' in one.rest


def _kernel(one: Instruction, shapes: Mapping[str, str], computations: Computations) -> Kernel:
    source = re.search(r'op_name="([^"]*)"', one.rest)
    if one.op == "fusion":
        lines = computations[one.called("calls")]
        read, written = sum(_read(lines, computations)), _written(lines, computations)
        only_copies = {line.op for line in lines} <= {*_NO_KERNELS, *_COPIES}
    else:
        read, written = _of_operands(one, shapes), _of_result(one, shapes)
        only_copies = one.op in _COPIES
    copies = only_copies and min(read, written) >= _LEAST_COPY
    return Kernel(one.name, read, written, source[1] if source else "", copies, one.is_started)


def _of_operands(one: Instruction, shapes: Mapping[str, str]) -> int:
    sizes = {name: main_memory_bytes(shapes.get(name, "")) for name in one.operands}
    if one.op in _UPDATES:
        sizes[one.operands[0]] = 0
    elif one.op in _PARTS:
        sizes[one.operands[0]] = min(sizes[one.operands[0]], array_bytes(one.shape))
    return sum(sizes.values())


def _of_result(one: Instruction, shapes: Mapping[str, str]) -> int:
    written = main_memory_bytes(one.shape)
    if one.op in _UPDATES:
        return min(written, array_bytes(shapes.get(one.operands[_UPDATES[one.op]], "")))
    return written


def _read(lines: Sequence[Instruction], computations: Computations) -> list[int]:
    """Bytes that a fusion reads of each parameter, in their order."""
    wanted = _wanted(lines, computations)
    parameters = sorted((one for one in lines if one.op == "parameter"), key=_number)
    return [round(wanted[one.name] * main_memory_bytes(one.shape)) for one in parameters]


def _number(parameter: Instruction) -> int:
    return int(_parts(parameter.rest)[0])


def _wanted(lines: Sequence[Instruction], computations: Computations) -> dict[str, float]:
    """Which share of the entries of each array a fusion asks for: it computes those alone that its result needs."""
    shapes = {one.name: one.shape for one in lines}
    wanted = {one.name: float(one.is_root) for one in lines}
    for one in reversed(lines):
        for number, name in enumerate(one.operands):
            if name in wanted and wanted[one.name]:
                share = _share(one, number, wanted[one.name], shapes, computations)
                wanted[name] = min(1.0, wanted[name] + share)
    return wanted


def _share(
    one: Instruction, number: int, wanted: float, shapes: Mapping[str, str], computations: Computations
) -> float:
    """Which share of an operand's entries an instruction asks for, of whose result a share is `wanted`."""
    size, asked = array_bytes(one.shape), array_bytes(shapes[one.operands[number]])
    if one.op == "fusion":
        inside = computations[one.called("calls")]
        return next(
            _wanted(inside, computations)[p.name] for p in inside if p.op == "parameter" and _number(p) == number
        )
    if number == 0 and one.op in _UPDATES:
        return 0.0
    if number == 0 and one.op in _PARTS:
        return wanted * size / asked
    return wanted if one.op in _PART_BY_PART else 1.0


def _written(lines: Sequence[Instruction], computations: Computations) -> int:
    """Bytes that a computation writes as its result."""
    by_name = {one.name: one for one in lines}
    shapes = {one.name: one.shape for one in lines}

    def of(one: Instruction) -> int:
        if one.op == "tuple":
            return sum(of(by_name[name]) for name in one.operands)
        if one.op == "bitcast" and one.operands[0] in by_name:
            return min(main_memory_bytes(one.shape), of(by_name[one.operands[0]]))
        if one.op == "fusion":
            return _written(computations[one.called("calls")], computations)
        return _of_result(one, shapes)

    return of(next(one for one in lines if one.is_root))
