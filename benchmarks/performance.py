"""The generated parts of docs/performance.md, from committed results."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.decode import compiling, ratios
from benchmarks.environment import REPOSITORY, read_results, spread
from benchmarks.sweeps import AXES
from benchmarks.tables import made_on, markdown, shown_range

PAGE = REPOSITORY / "docs" / "performance.md"
PICTURES = PAGE.parent / "performance"
Result = dict[str, Any]
OURS, EAGER, COMPILED = ("coreinfer",), ("transformers-eager",), ("transformers-compiled",)


@dataclass(frozen=True)
class Side:
    """One side of a comparison: of the results that match, the fastest is taken.

    Attributes:
        contenders: any of these.
        keep: share of neurons, None for all.
        dtype: None for any.
    """

    contenders: tuple[str, ...]
    keep: float | None = None
    dtype: str | None = None

    def fastest(self, results: Sequence[Result]) -> Result | None:
        """Of `results`, None where none matches."""
        matching = [
            r
            for r in results
            if r["contender"] in self.contenders and r["keep"] == self.keep and self.dtype in (None, r["dtype"])
        ]
        return min(matching, key=lambda r: r["decode_ms_per_token"]["median"], default=None)

    @property
    def title(self) -> str:
        """What is compared, in words."""
        kept = "" if self.keep is None else f", keep {self.keep:g}"
        return f"{' or '.join(self.contenders)}{kept}, {self.dtype or 'fastest'}"


# What was aimed at on a CPU: how many times faster the first side decodes than the second.
TARGETS: tuple[tuple[Side, Side, float], ...] = (
    (Side(OURS, None, "float32"), Side(EAGER + COMPILED, None, "float32"), 1.8),
    (Side(OURS, 0.2, "float32"), Side(EAGER + COMPILED, None, "float32"), 3.2),
    (Side(OURS, None, "bfloat16"), Side(OURS, None, "float32"), 1.6),
    (Side(OURS, 0.2), Side(EAGER + COMPILED), 3.5),
    (Side(OURS, 0.2), Side(("llama.cpp",), None, "F16"), 1.8),
)
SHARE_TARGET = 0.8
# What a user would pick instead; where no type is named, in its fastest.
ELSEWHERE: dict[str, Side] = {
    "coreinfer, all neurons": Side(OURS),
    "transformers-eager": Side(EAGER),
    "transformers-compiled": Side(COMPILED),
    "llama.cpp F16": Side(("llama.cpp",), None, "F16"),
    "llama.cpp Q8_0": Side(("llama.cpp",), None, "Q8_0"),
    "llama.cpp Q4_0": Side(("llama.cpp",), None, "Q4_0"),
    "predictor": Side(("predictor",), 0.2),
}


def decode_runs() -> dict[str, list[Result]]:
    """The newest run of each model and machine, by its title; results of one run only stand beside each other.

    A run writes its results anew after every round; the last of them count.
    """
    runs: dict[str, list[Result]] = {}
    for result in read_results("decode"):
        run = runs.setdefault(_title(result), [])
        if run and (run[0]["run"], run[0]["rounds"]) != (result["run"], result["rounds"]):
            run.clear()
        run.append(result)
    return runs


def newest_sweeps() -> list[Result]:
    """The newest result of each axis, model, machine and type."""
    return list({(r["over"], _title(r), r["dtype"]): r for r in read_results("sweep")}.values())


def _title(result: Result) -> str:
    whole = result["model_layers"]
    cut = "" if result["layers"] == whole else f", {result['layers']} of {whole} layers"
    rows = "" if result.get("rows", 1) == 1 else f", {result['rows']} rows"
    return f"{result['model']} shape{cut}{rows}; {result['hardware']}"


def contender_title(result: Result) -> str:
    """A contender with its type and keep ratio."""
    kept = "" if result["keep"] is None else f", keep {result['keep']:g}"
    return f"{result['contender']} {result['dtype']}{kept}"


def file_name(title: str) -> str:
    """`title` as the name of a picture."""
    return re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-") + ".png"


def _summary() -> str:
    """What a token takes, and how many times as fast that is as what a user would pick instead."""
    runs = {title: results for title, results in decode_runs().items() if title.endswith("cpu")}
    rows = [["", *(title.partition(";")[0] for title in runs)]]
    for keep in (None, 0.4, 0.2):
        rows.append([f"coreinfer, {'all neurons' if keep is None else f'keep {keep:g}'}: ms per token"])
        rows[-1] += [_milliseconds(Side(OURS, keep).fastest(results)) for results in runs.values()]
    for title, other in ELSEWHERE.items():
        rows.append(
            [
                f"keep 0.2: times as fast as {title}",
                *(_gain(Side(OURS, 0.2), other, results) for results in runs.values()),
            ]
        )
    together = [result for results in runs.values() for result in results]
    return f"{markdown(rows)}\n\n{conditions(together)}"


def _milliseconds(result: Result | None) -> str:
    return "" if result is None else f"{result['dtype']} {shown_range(result['decode_ms_per_token'], 1)}"


def _gain(ours: Side, theirs: Side, results: Sequence[Result]) -> str:
    one, other = ours.fastest(results), theirs.fastest(results)
    if one is None or other is None:
        return ""
    return f"x {shown_range(ratios(one, other), 2)}, {one['dtype']} to {other['dtype']}"


def _targets() -> str:
    runs = {title: results for title, results in decode_runs().items() if title.endswith("cpu")}
    rows = [["aim", *(title.partition(";")[0] for title in runs)]]
    for ours, theirs, least in TARGETS:
        cells = [_verdict(ours, theirs, least, results) for results in runs.values()]
        rows.append([f"{ours.title}: at least {least:g} times as fast as {theirs.title}", *cells])
    for keep in (None, 0.2):
        for dtype in ("float32", "bfloat16"):
            side = Side(OURS, keep, dtype)
            shares = [_share(side.fastest(results)) for results in runs.values()]
            rows.append([f"{side.title}: at least {SHARE_TARGET:.0%} of plain reads", *shares])
    return markdown(rows)


def _verdict(ours: Side, theirs: Side, least: float, results: Sequence[Result]) -> str:
    one, other = ours.fastest(results), theirs.fastest(results)
    if one is None or other is None:
        return ""
    met = ratios(one, other)["median"] >= least
    return f"{'met' if met else 'missed'}: {_gain(ours, theirs, results)}"


def _share(result: Result | None) -> str:
    if result is None:
        return ""
    share = result["bandwidth_share"]
    percent = f"{share['median']:.0%} ({share['min']:.0%} .. {share['max']:.0%})"
    return f"{'met' if share['median'] >= SHARE_TARGET else 'missed'}: {percent}"


def _decode() -> str:
    sections = []
    for title, results in decode_runs().items():
        heading = f"### {title}"
        picture = f"![Milliseconds per token of all contenders](performance/{file_name(title)})"
        sections += [heading, picture, _speed(results), _phases(results), conditions(results)]
    return "\n\n".join(sections)


def _speed(results: Sequence[Result]) -> str:
    rows = [["", "ms per token", "GB per token", "GB/s", "of plain reads", "tokens/s, whole", "pays from"]]
    for r in results:
        rows.append(
            [
                contender_title(r),
                shown_range(r["decode_ms_per_token"], 1),
                f"{r['gb_per_token']:.2f}",
                f"{r['gb_per_second']['median']:.1f}",
                f"{r['bandwidth_share']['median']:.0%}",
                shown_range(r["tokens_per_second"], 1),
                f"{r['pays_from_tokens']} tokens" if r.get("pays_from_tokens") else "",
            ]
        )
    return markdown(rows)


def _phases(results: Sequence[Result]) -> str:
    rows = [["seconds, gigabytes", "load", "compile, again", "prefill", "selection", "gather", "first token"]]
    rows[0] += ["memory", "mapped files", "device", "temporaries"]
    for r in results:
        phases = ("prefill_seconds", "selection_seconds", "compaction_seconds", "first_token_seconds")
        rows.append(
            [
                contender_title(r),
                f"{r['load_seconds']['median']:.1f}",
                compiling(r),
                *("" if r[phase] is None else f"{r[phase]['median']:.2f}" for phase in phases),
                f"{r['anonymous_gb']:.1f}",
                f"{r['file_gb']:.1f}",
                "" if r["device_gb"] is None else f"{r['device_gb']:.1f}",
                "" if r["temporary_gb"] is None else f"{r['temporary_gb']:.3f}",
            ]
        )
    return markdown(rows)


def _by_token() -> str:
    """What predicting neurons for every token costs beside core neurons, per model and type."""
    rows = [["", "core neurons, ms", "changed, ms", "and predicted, ms", "changing", "predicting", "predictors"]]
    for title, results in decode_runs().items():
        for dtype in dict.fromkeys(r["dtype"] for r in results if r["contender"] == "gather"):
            changed = Side(("gather",), 0.2, dtype).fastest(results)
            core, predicted = (Side((name,), 0.2, dtype).fastest(results) for name in ("coreinfer", "predictor"))
            if core and changed and predicted:
                rows.append([f"{title.partition(';')[0]}, {dtype}", *_steps(core, changed, predicted)])
    return markdown(rows)


def _steps(core: Result, changed: Result, predicted: Result) -> list[str]:
    """The times of three steps, their differences round by round, and the memory of the predictors."""
    times = [result["decode_ms_per_token_by_round"] for result in (core, changed, predicted)]
    differences = [
        spread([b - a for a, b in zip(*pair, strict=True)]) for pair in ((times[0], times[1]), (times[1], times[2]))
    ]
    shown = [shown_range(value, 1) for value in (*map(spread, times), *differences)]
    return [*shown, f"{predicted['predictor_gb']:.2f} GB"]


def conditions(results: Sequence[Result]) -> str:
    """The sizes of a run, and what it was made on."""
    first = results[0]
    rounds = "1 round" if first["rounds"] == 1 else f"{first['rounds']} rounds"
    sizes = f"Prompt of {first['prompt_tokens']} tokens, {first['new_tokens']} new ones, {rounds}"
    return f"{sizes}; {made_on(*results)}"


def _profiles() -> str:
    """The newest profile of each model, type, keep ratio and machine, one table each."""
    newest = {(_title(r), r["dtype"], r["keep"]): r for r in read_results("profile")}
    return "\n\n".join(_of_profile(result) for result in newest.values())


def _of_profile(result: Result) -> str:
    kept = "all neurons" if result["keep"] is None else f"keep {result['keep']:g}"
    plain = result["plain_gb_per_second"]
    rows = [["weights, out x in", "how many", "GB", "ms per step", "GB/s"]]
    for p in result["products"]:
        rows.append(
            [p["shape"], str(p["matrices"]), f"{p['gb']:.3f}", f"{p['ms']:.1f}", f"{1000 * p['gb'] / p['ms']:.1f}"]
        )
    rest = result["step_ms"] - sum(p["ms"] for p in result["products"])
    rows += [["all else", "", "", f"{rest:.1f}", ""], ["a step", "", "", f"{result['step_ms']:.1f}", ""]]
    what = f"{_title(result).partition(';')[0]}, {result['dtype']}, {kept}; plain reads {plain:.1f} GB/s"
    return f"{markdown(rows)}\n\n{what}; {made_on(result)}"


# What the table of a sweep shows: the field of its points, the factor to the unit, and digits.
PHASES: dict[str, tuple[str, float, int]] = {
    "prefill, ms": ("prefill_seconds", 1e3, 0),
    "selection, ms": ("selection_seconds", 1e3, 1),
    "gather, ms": ("compaction_seconds", 1e3, 0),
    "step, ms": ("decode_ms_per_step", 1.0, 1),
    "whole, s": ("total_seconds", 1.0, 2),
}
SWEEP_COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt-tokens": ("prefill, ms", "selection, ms", "prefill memory, MB"),
    "new-tokens": ("step, ms", "whole, s"),
    "layers": ("prefill, ms", "step, ms"),
    "keep": ("gather, ms", "step, ms", "MB per token"),
    "rows": ("step, ms", "MB per token"),
}


def _sweeps(over: str) -> str:
    return "\n\n".join(_of_sweep(result) for result in newest_sweeps() if result["over"] == over)


def sweep_picture(result: Result) -> str:
    """The name of its picture."""
    return file_name(f"{result['over']} {_title(result)} {result['dtype']}")


def _of_sweep(result: Result) -> str:
    name, _, settings = AXES[result["over"]]
    columns = [(setting, phase) for phase in SWEEP_COLUMNS[result["over"]] for setting in settings]
    rows = [[name.replace("_", " "), *(f"{phase}: {setting}" for setting, phase in columns)]]
    for value in dict.fromkeys(point[name] for point in result["points"]):
        own = {point["setting"]: point for point in result["points"] if point[name] == value}
        rows.append([f"{value:g}", *(_cell(own[setting], phase) for setting, phase in columns)])
    picture = f"![Cost by {result['over']}](performance/{sweep_picture(result)})"
    what = f"{_title(result).partition(';')[0]}, {result['dtype']}, {result['rounds']} rounds; {made_on(result)}"
    return f"{picture}\n\n{markdown(rows)}\n\n{what}"


def _cell(point: Mapping[str, Any], phase: str) -> str:
    if phase == "prefill memory, MB":
        size = point["prefill_temporary_bytes"]
        return "" if size is None else f"{size / 1e6:.1f}"
    if phase == "MB per token":
        return f"{point['bytes_per_token'] / 1e6:.0f}"
    field, factor, digits = PHASES[phase]
    return shown_range({name: value * factor for name, value in point[field].items()}, digits)


def sections() -> dict[str, Callable[[], str]]:
    """What makes each of the page's generated sections, by its name."""
    swept = {f"sweep {over}": partial(_sweeps, over) for over in AXES}
    return {
        "summary": _summary,
        "targets": _targets,
        "decode": _decode,
        "predictor": _by_token,
        "profile": _profiles,
        **swept,
    }
