"""The pictures of docs/performance.md, drawn from committed results; they can be told apart without colours."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.performance import PICTURES, contender_title, decode_runs, file_name, newest_sweeps, sweep_picture
from benchmarks.sweeps import AXES, CORE, DENSE, SHARED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 120
# Colour and hatch of each contender.
LOOKS = {
    "coreinfer": ("tab:blue", ""),
    "predictor": ("tab:purple", ".."),
    "gather": ("tab:pink", "oo"),
    "transformers-eager": ("tab:orange", "//"),
    "transformers-compiled": ("tab:red", "xx"),
    "llama.cpp": ("tab:green", "--"),
}
LINES = {DENSE: ("k", "-", "o"), CORE: ("tab:blue", "--", "s"), SHARED: ("tab:green", "-.", "^")}


def draw() -> None:
    """Write every picture anew."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for title, results in decode_runs().items():
        _draw_decode(title, results, PICTURES / file_name(title))
    for result in newest_sweeps():
        _draw_sweep(result, PICTURES / sweep_picture(result))


def _draw_decode(title: str, results: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 + 0.32 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    for place, result in enumerate(results):
        time = result["decode_ms_per_token"]
        errors = [[time["median"] - time["min"]], [time["max"] - time["median"]]]
        colour, hatch = LOOKS[result["contender"]]
        axes.barh(
            place,
            time["median"],
            xerr=errors,
            color=colour,
            hatch=hatch,
            alpha=0.75,
            edgecolor="white",
            capsize=2,
        )
    axes.set_yticks(range(len(results)), [contender_title(result) for result in results])
    axes.invert_yaxis()
    axes.set(xlabel="ms per token: median, and least and most of all generations", title=title.replace("; ", "\n"))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=DPI)


def _draw_sweep(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for setting in AXES[result["over"]][2]:
        points = [point for point in result["points"] if point["setting"] == setting]
        _curve(left, result["over"], points, setting, "prefill_seconds")
        _curve(middle, result["over"], points, setting, "decode_ms_per_step")
        _curve(right, result["over"], points, setting, "total_seconds")
    for axes, title in ((left, "prefill, s"), (middle, "decode step, ms"), (right, "whole generation, s")):
        axes.set(xlabel=AXES[result["over"]][0].replace("_", " "), title=title, ylim=(0, None))
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(
        f"{result['model']} shape, {result['dtype']}: medians, and least and most of {result['rounds']} rounds"
    )
    figure.savefig(path, dpi=DPI)


def _curve(axes: "Axes", over: str, points: Sequence[dict[str, Any]], setting: str, what: str) -> None:
    field = AXES[over][0]
    places = [point[field] for point in points]
    values = [point[what] for point in points]
    errors = [[v["median"] - v["min"] for v in values], [v["max"] - v["median"] for v in values]]
    colour, line, marker = LINES[setting]
    axes.errorbar(
        places,
        [v["median"] for v in values],
        yerr=errors,
        color=colour,
        linestyle=line,
        marker=marker,
        markersize=4,
        capsize=2,
        label=setting,
    )
