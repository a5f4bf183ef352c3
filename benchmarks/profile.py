"""Where the time of a decode step goes, product by product, from XLA's own record of a generation."""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

import coreinfer_jax as ci
from benchmarks.contenders.coreinfer import decode_program
from benchmarks.contenders.trial import Trial
from benchmarks.environment import environment
from benchmarks.memory import bandwidth
from benchmarks.shapes import random_prompts, shape_config, shape_fields, shape_params
from coreinfer_jax.checks import check_fraction
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.weights import Params, leaf_bytes, named_leaves

PROMPT_TOKENS, NEW_TOKENS = 64, 57
_MODULE = "jit_decode"
# As HLO writes types.
_TYPES = {"float32": "f32", "bfloat16": "bf16"}
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\w+\[[\d,]*\])\S* [\w-]+\((?P<operands>[^)]*)\)"
)


def measure(model: str, layers: int | None, dtype: str, keep: float | None) -> dict[str, Any]:
    """One result: the step's products by the shape of their weights, with what each reads and how long it takes.

    Raises:
        CoreInferError: an unknown model, or a record without this program's operations.
    """
    if keep is not None:
        check_fraction("--keep", keep)
    if jax.default_backend() != "cpu":
        raise CoreInferError("profile reads the record that XLA keeps of operations on a CPU; set JAX_PLATFORMS=cpu")
    fields = shape_fields(model, layers)
    trial = Trial("coreinfer", dtype, keep, fields, PROMPT_TOKENS, NEW_TOKENS)
    params = shape_params(shape_config(fields), dtype)
    made_on = environment()
    durations, step, narrowed = _traced(params, trial)
    shape_of = _weights_read(decode_program(narrowed, trial).as_text() or "")
    milliseconds: defaultdict[str, float] = defaultdict(float)
    for operation, spent in durations.items():
        milliseconds[shape_of.get(operation, "")] += spent
    products = [
        {"shape": shape, "matrices": count, "gb": size / 1e9, "ms": milliseconds[_hlo(shape, dtype)]}
        for shape, (count, size) in matrices(narrowed).items()
    ]
    if unseen := [product["shape"] for product in products if not product["ms"]]:
        raise CoreInferError(f"XLA's record names no operation that reads the weights of {unseen[0]}; nothing to tell")
    return made_on | {
        "benchmark": "profile",
        "model": model,
        "layers": fields["num_hidden_layers"],
        "model_layers": shape_config(shape_fields(model, None)).num_layers,
        "dtype": dtype,
        "keep": keep,
        "step_ms": step,
        "products": products,
        "plain_gb_per_second": bandwidth() / 1e9,
    }


def _traced(params: Params, trial: Trial) -> tuple[Mapping[str, float], float, Params]:
    """Milliseconds per step of every operation, of a whole step, and the weights it reads."""
    core = None if trial.keep is None else ci.CoreConfig(beta=trial.keep, allocation="equal")
    chunks = ci.stream(params, random_prompts(params.config, 1, PROMPT_TOKENS), core, max_new_tokens=NEW_TOKENS)
    next(chunks)
    before = next(chunks).stats  # everything is compiled
    with TemporaryDirectory(prefix="coreinfer-profile-") as folder:
        with jax.profiler.trace(folder):
            last = list(chunks)[-1]
        (record,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(record, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    steps = last.stats.decode_steps - before.decode_steps
    spent: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.get("args", {}).get("hlo_module") == _MODULE:
            spent[event["args"]["hlo_op"]] += event["dur"] / 1000 / steps
    whole = 1000 * (last.stats.decode_seconds - before.decode_seconds) / steps
    return spent, whole, params if last.core is None else ci.compact(params, last.core)


def _weights_read(program: str) -> dict[str, str]:
    """The largest operand with two axes of every operation of an HLO `program`, as HLO writes its type and shape."""
    found = [match for line in program.splitlines() if (match := _INSTRUCTION.match(line))]
    # No weight is made by an operation that gives several arrays.
    shapes = {match["name"]: match["shape"] for match in found if not match["shape"].startswith("(")}
    read = {}
    for match in found:
        operands = [shapes.get(name.strip().lstrip("%").split("%")[-1], "") for name in match["operands"].split(",")]
        matrices = [shape for shape in operands if shape.count(",") == 1]
        if matrices:
            read[match["name"]] = max(matrices, key=_entries)
    return read


def _entries(shape: str) -> int:
    rows, columns = shape.partition("[")[2].rstrip("]").split(",")
    return int(rows) * int(columns)


def _hlo(shape: str, dtype: str) -> str:
    return f"{_TYPES[dtype]}[{shape.replace(' x ', ',')}]"


def matrices(params: Params) -> dict[str, tuple[int, int]]:
    """By shape, as `out x in`, how many matrices a step multiplies by, and their bytes."""
    looked_up = {"position_embedding"} | (set() if params.unembedding is None else {"token_embedding"})
    counted: dict[str, tuple[int, int]] = {}
    for name, leaf in named_leaves(params):
        if leaf.ndim == 2 and name not in looked_up:
            shape = f"{leaf.shape[0]} x {leaf.shape[1]}"
            count, size = counted.get(shape, (0, 0))
            counted[shape] = (count + 1, size + leaf_bytes(leaf))
    return counted
