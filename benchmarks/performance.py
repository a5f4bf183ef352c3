"""The tables of docs/performance.md and of the README's section on speed, from committed results."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.decode import ratios
from benchmarks.environment import REPOSITORY, RESULTS
from benchmarks.sweeps import AXES

PAGE = REPOSITORY / "docs" / "performance.md"
PICTURES = PAGE.parent / "performance"
Result = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """Contenders of one side of a comparison; the fastest of those that match is taken.

    Attributes:
        contender: its name.
        keep: share of neurons, None for all.
        dtype: None for any.
    """

    contender: str
    keep: float | None = None
    dtype: str | None = None

    def fastest(self, results: Sequence[Result]) -> Result | None:
        """Of `results`, None where none matches."""
        matching = [
            r
            for r in results
            if r["contender"] == self.contender and r["keep"] == self.keep and self.dtype in (None, r["dtype"])
        ]
        return min(matching, key=lambda r: r["decode_ms_per_token"]["median"], default=None)


# What was aimed at, on a CPU: how many times faster the first side decodes than the second.
TARGETS: tuple[tuple[Side, Side, float], ...] = (
    (Side("coreinfer", None, "float32"), Side("transformers-eager", None, "float32"), 1.8),
    (Side("coreinfer", 0.2, "float32"), Side("transformers-eager", None, "float32"), 3.2),
    (Side("coreinfer", None, "bfloat16"), Side("coreinfer", None, "float32"), 1.6),
    (Side("coreinfer", 0.2), Side("transformers-eager"), 3.5),
    (Side("coreinfer", 0.2), Side("llama.cpp", None, "F16"), 1.8),
)
SHARE_TARGET = 0.8
# What a user would pick instead, each in the fastest type it has.
ELSEWHERE = (
    Side("coreinfer", None),
    Side("transformers-eager"),
    Side("transformers-compiled"),
    Side("llama.cpp", None, "F16"),
    Side("llama.cpp", None, "Q8_0"),
    Side("llama.cpp", None, "Q4_0"),
    Side("predictor", 0.2),
)


def decode_runs() -> dict[str, list[Result]]:
    """The newest run of each model, by its title."""
    runs: dict[str, list[Result]] = {}
    for result in _lines("decode"):
        title = _title(result)
        earlier = runs.get(title, [])
        known = {contender_title(r) for r in earlier}
        # A contender that comes again begins another run.
        runs[title] = [result] if contender_title(result) in known else [*earlier, result]
    return runs


def _title(result: Result) -> str:
    cut = (
        "" if result["layers"] == result["model_layers"] else f", {result['layers']} of {result['model_layers']} layers"
    )
    rows = "" if result["rows"] == 1 else f", {result['rows']} rows"
    return f"{result['model']} shape{cut}{rows}"


def contender_title(result: Result) -> str:
    """A contender with its type and keep ratio."""
    kept = "" if result["keep"] is None else f", keep {result['keep']:g}"
    return f"{result['contender']} {result['dtype']}{kept}"


def summary() -> str:
    """The README's table: how many times faster ours decodes than what a user would pick instead."""
    runs = decode_runs()
    rows = [["", *runs]]
    for keep in (None, 0.4, 0.2):
        rows.append([f"ours, {'all neurons' if keep is None else f'keep {keep:g}'}: ms per token"])
        rows[-1] += [_milliseconds(Side("coreinfer", keep).fastest(results)) for results in runs.values()]
    for other in ELSEWHERE:
        cells = [_gain(Side("coreinfer", 0.2), other, results) for results in runs.values()]
        rows.append([f"keep 0.2 to {_named(other)}", *cells])
    return _markdown(rows)


def _named(side: Side) -> str:
    title = "our own, all neurons" if side == Side("coreinfer") else side.contender
    return f"{title}{'' if side.dtype is None else f' {side.dtype}'}"


def _milliseconds(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result['dtype']} {_range(result['decode_ms_per_token'], 1)}"


def _gain(ours: Side, theirs: Side, results: Sequence[Result]) -> str:
    one, other = ours.fastest(results), theirs.fastest(results)
    if one is None or other is None:
        return ""
    return f"x {_range(ratios(one, other), 2)}, {one['dtype']} to {other['dtype']}"


def _targets() -> str:
    runs = decode_runs()
    rows = [["aim", *runs]]
    for ours, theirs, least in TARGETS:
        cells = [_verdict(ours, theirs, least, results) for results in runs.values()]
        rows.append([f"{_side(ours)} at least x {least:g} {_side(theirs)}", *cells])
    for keep in (None, 0.2):
        for dtype in ("float32", "bfloat16"):
            side = Side("coreinfer", keep, dtype)
            shares = [side.fastest(results) for results in runs.values()]
            rows.append([f"{_side(side)}: at least {SHARE_TARGET:.0%} of plain reads", *map(_share, shares)])
    return _markdown(rows)


def _side(side: Side) -> str:
    kept = "" if side.keep is None else f" keep {side.keep:g}"
    whose = "our" if side.contender == "coreinfer" else side.contender
    return f"{whose}{kept} {side.dtype or 'fastest'}"


def _verdict(ours: Side, theirs: Side, least: float, results: Sequence[Result]) -> str:
    one, other = ours.fastest(results), theirs.fastest(results)
    if one is None or other is None:
        return ""
    found = ratios(one, other)
    return f"{'met' if found['median'] >= least else 'missed'}: {_gain(ours, theirs, results)}"


def _share(result: Result | None) -> str:
    if result is None:
        return ""
    share = result["bandwidth_share"]
    return f"{'met' if share['median'] >= SHARE_TARGET else 'missed'}: {_percent(share)}"


def _percent(values: Mapping[str, float]) -> str:
    return f"{values['median']:.0%} ({values['min']:.0%} .. {values['max']:.0%})"


def _speed(results: Sequence[Result]) -> str:
    rows = [["", "ms per token", "GB per token", "GB/s", "of plain reads", "tokens/s, whole", "pays from"]]
    for r in results:
        rows.append(
            [
                contender_title(r),
                _range(r["decode_ms_per_token"], 1),
                f"{r['gb_per_token']:.2f}",
                f"{r['gb_per_second']['median']:.1f}",
                f"{r['bandwidth_share']['median']:.0%}",
                _range(r["tokens_per_second"], 1),
                f"{r['pays_from_tokens']} tokens" if r.get("pays_from_tokens") else "",
            ]
        )
    return f"{_markdown(rows)}\n\n{_conditions(results[0])}"


def _phases(results: Sequence[Result]) -> str:
    rows = [["", "load", "compile", "compile again", "prefill", "selection", "compaction", "first token"]]
    rows[0] += ["memory", "mapped files"]
    for r in results:
        warm = r["compile_warm_seconds"]
        rows.append(
            [
                contender_title(r),
                f"{r['load_seconds']['median']:.1f}",
                f"{r['compile_cold_seconds']:.1f}",
                "" if warm is None else f"{warm['median']:.1f}",
                *(_seconds(r[name]) for name in ("prefill_seconds", "selection_seconds", "compaction_seconds")),
                _seconds(r["first_token_seconds"]),
                f"{r['anonymous_gb']:.1f}",
                f"{r['file_gb']:.1f}",
            ]
        )
    return _markdown(rows)


def _seconds(values: Mapping[str, float] | None) -> str:
    return "" if values is None else f"{values['median']:.2f}"


def _conditions(result: Result) -> str:
    sizes = f"prompt of {result['prompt_tokens']} tokens, {result['new_tokens']} new ones, {result['rounds']} rounds"
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    revision = f"revision {result['git_revision']}, {result['date']}"
    return f"{sizes}; {result['hardware']}; {versions}; {revision}."


def _range(values: Mapping[str, float], digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} .. {values['max']:.{digits}f})"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body))


def _sweep(result: Result, phases: Sequence[str]) -> str:
    name, _, settings = AXES[result["over"]]
    columns = [(setting, phase) for phase in phases for setting in settings]
    rows = [[name.replace("_", " "), *(f"{phase}: {setting}" for setting, phase in columns)]]
    for value in dict.fromkeys(point[name] for point in result["points"]):
        own = {point["setting"]: point for point in result["points"] if point[name] == value}
        rows.append([f"{value:g}", *(_cell(own[setting], phase) for setting, phase in columns)])
    return f"{_markdown(rows)}\n\nMedian (least .. most); {result['dtype']}. {_made_on(result)}"


# What the table of a sweep shows: the field of its points, the factor to the unit, and digits.
PHASES: dict[str, tuple[str, float, int]] = {
    "prefill, ms": ("prefill_seconds", 1e3, 0),
    "selection, ms": ("selection_seconds", 1e3, 1),
    "gather, ms": ("compaction_seconds", 1e3, 0),
    "step, ms": ("decode_ms_per_step", 1.0, 1),
    "whole, s": ("total_seconds", 1.0, 2),
}


def _cell(point: Mapping[str, Any], phase: str) -> str:
    if phase == "prefill memory, MB":
        return f"{point['prefill_temporary_bytes'] / 1e6:.1f}"
    if phase == "MB per token":
        return f"{point['bytes_per_token'] / 1e6:.0f}"
    field, factor, digits = PHASES[phase]
    return _range({name: value * factor for name, value in point[field].items()}, digits)


SWEEP_COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt-tokens": ("prefill, ms", "prefill memory, MB", "step, ms"),
    "new-tokens": ("step, ms", "whole, s"),
    "layers": ("prefill, ms", "step, ms"),
    "keep": ("gather, ms", "step, ms", "MB per token"),
    "rows": ("step, ms", "MB per token"),
}


def _products(result: Result) -> str:
    rows = [["weights", "matrices", "GB/s", "of plain reads", "ms per step"]]
    plain = result["plain_gb_per_second"]
    for dtype, measured in result["dtypes"].items():
        for product in measured["products"]:
            speed = product["gb_per_second"]
            name = f"{dtype} [{product['out']}, {product['in']}]"
            share = f"{speed['median'] / plain:.0%}"
            rows.append([name, str(product["number"]), _range(speed, 1), share, _range(product["ms"], 1)])
        rest = measured["step_ms"]["median"] - sum(product["ms"]["median"] for product in measured["products"])
        rows.append([f"{dtype}, all else", "", "", "", f"{rest:.1f}"])
        rows.append([f"{dtype}, whole step", "", "", "", _range(measured["step_ms"], 1)])
    plain_reads = f"Plain reads: {plain:.1f} GB/s. "
    return f"{_markdown(rows)}\n\n{plain_reads}{_made_on(result)}"


def _made_on(result: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    what = f"{result['model']} shape, {result['layers']} layers, {result['rounds']} rounds"
    return f"{what}; {result['hardware']}; {versions}; revision {result['git_revision']}, {result['date']}."


def _lines(name: str) -> list[Result]:
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def sweeps() -> dict[str, Result]:
    """The newest result of each sweep."""
    return {result["over"]: result for result in _lines("sweep")}


def tables() -> dict[str, Callable[[], str]]:
    """What makes each of the page's tables, by its name."""
    made: dict[str, Callable[[], str]] = {"targets": _targets}
    made |= {f"sweep {over}": partial(_sweep, result, SWEEP_COLUMNS[over]) for over, result in sweeps().items()}
    made |= {f"products {result['model']}": partial(_products, result) for result in _lines("products")}
    for results in decode_runs().values():
        model = results[0]["model"]
        made |= {f"speed {model}": partial(_speed, results), f"phases {model}": partial(_phases, results)}
    return made
