"""The pictures of an analysis, each from the numbers in its JSON: readable in black and white, of pyplot no trace."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from coreinfer_jax.errors import CoreInferError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*<>"

METHOD_LABELS = {
    "stability": "stability: the prompt's own",
    "similarity": "similarity: its group's",
    "fused": "fused",
}


def require_drawing() -> None:
    """Refuse early what could not be measured or drawn at the end."""
    if any(find_spec(name) is None for name in ("matplotlib", "sklearn", "scipy")):
        raise CoreInferError("analyze draws and groups: pip install 'coreinfer_jax[analyze]'")


def perplexity(found: Mapping[str, Any]) -> "Figure":
    """Against alpha and against beta, one panel each."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (left, right) = _panels(1, 2, share_y=True)
    numbers, shares = found["perplexity"], found["shares"]
    continuation = f"the {found['continuation_tokens']} tokens after a prompt of {found['prompt_tokens']}"
    _level(left, numbers["dense"], "whole text, all neurons")
    _curve(left, shares, numbers["token"], 0, "whole text, each token on its own")
    _level(right, numbers["dense"], "whole text, all neurons")
    _level(right, numbers["dense_continuation"], "continuation, all neurons", ":")
    _curve(right, shares, numbers["text"], 1, "whole text, on its own core neurons")
    _curve(right, shares, numbers["decoding"], 2, "continuation, on its prompt's core neurons")
    left.set(
        xlabel=r"$\alpha$, share of a token's positive neurons",
        ylabel="perplexity (log scale)",
        title="token-wise core neurons",
        yscale="log",
    )
    right.set(
        xlabel=rf"$\beta$, share of all neurons ($\alpha$ = {found['alpha']:g})", title="sentence-wise core neurons"
    )
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # both panels share the axis
    left.yaxis.set_major_formatter("{x:.0f}")
    left.yaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        _finish(axes)
    figure.suptitle(f"Perplexity of {found['texts']} texts; continuation: {continuation}")
    return figure


def extension(found: Mapping[str, Any]) -> "Figure":
    """Share that changes against the original length, and overlap against the extension."""
    figure, (left, right) = _panels(1, 2)
    originals, added = np.array(found["original_tokens"]), np.array(found["added_tokens"])
    overlap = {name: np.array(values) for name, values in found["overlap"].items()}
    for i, more in enumerate(np.unique(added)):
        own = added == more
        changed = {name: 100 * (1 - values[own]) for name, values in overlap.items()}
        _spread(left, originals[own], changed, i, f"{more} tokens more")
    for i, length in enumerate(np.unique(originals)):
        own = originals == length
        shared = {name: 100 * values[own] for name, values in overlap.items()}
        _spread(right, added[own], shared, i, f"text of {length} tokens")
    _level(left, 100 * (1 - found["chance"]), "neurons at random", ":")
    _level(right, 100 * found["chance"], "neurons at random", ":")
    left.set(
        xlabel="length of the text (tokens)", ylabel="core neurons that change (%)", title="change", ylim=(0, None)
    )
    right.set(xlabel="tokens added", ylabel="core neurons in common (%)", title="overlap", ylim=(None, 100))
    for axes, ticks in ((left, originals), (right, added)):
        _log_ticks(axes, np.unique(ticks))
        _finish(axes)
    figure.suptitle(
        f"Core neurons of a text and of the same text extended ($\\beta$ = {found['beta']:g}; medians and quartiles of "
        f"{found['texts']} texts, mean over layers)"
    )
    return figure


def growth(found: Mapping[str, Any]) -> "Figure":
    """Overlap with the final set, and the votes of one text as a map."""
    from matplotlib.colors import PowerNorm

    figure, (left, right) = _panels(1, 2)
    lengths, one = found["tokens"], found["one_text"]
    overlap = {name: 100 * np.array(values) for name, values in found["overlap"].items()}
    left.fill_between(lengths, overlap["lower_quartile"], overlap["upper_quartile"], color="0.85", label="quartiles")
    _curve(left, lengths, overlap["median"], 0, "median")
    _level(left, 100 * found["chance"], "neurons at random", ":")
    left.set(
        xlabel="tokens read",
        ylabel=f"in common with the core neurons of {lengths[-1]} tokens (%)",
        title=f"{found['texts']} texts, mean over layers, $\\beta$ = {found['beta']:g}",
        ylim=(None, 101),
    )
    _finish(left)
    frequencies = np.array(one["frequencies"]).T
    # Cells end halfway between the measured lengths, and between the shown ranks.
    # Most frequencies are small: shades go by their square root.
    borders = np.exp2(_edges(np.log2(lengths))), _edges(one["ranks"])
    mesh = right.pcolormesh(*borders, frequencies, cmap="gray_r", norm=PowerNorm(0.5, 0, 1), rasterized=True)
    right.axhline(
        found["beta"] * one["neurons"], color="0.2", linestyle="--", label=r"core neurons end here ($\beta$ F)"
    )
    right.set(
        xlabel="tokens read",
        ylabel=f"neurons, the most voted at {lengths[-1]} tokens first",
        title=f"votes in one text, layer {one['layer']}",
    )
    right.invert_yaxis()
    for axes in (left, right):
        _log_ticks(axes, [n for n in lengths if n.bit_count() == 1])
    right.legend(loc="lower right", fontsize=8)
    figure.colorbar(mesh, ax=right, label="votes per token")
    figure.suptitle("Core neurons while a text grows")
    return figure


def topics(found: Mapping[str, Any]) -> "Figure":
    """Maps of some layers above, numbers of all layers below."""
    from matplotlib.figure import Figure

    maps = found["projection"]
    figure = Figure(figsize=(3.1 * max(2, len(maps)), 7), layout="constrained")
    grid = figure.add_gridspec(2, 1)
    upper, lower = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    labels = np.array(found["labels"])
    names = sorted(found["texts_per_label"])
    for axes, (layer, points) in zip(np.atleast_1d(upper.subplots(1, len(maps))), maps.items(), strict=True):
        for i, name in enumerate(names):
            x, y = np.array(points)[labels == name].T
            # Full and empty markers, so that twice as many labels can be told apart.
            full = i // len(MARKERS) % 2
            axes.scatter(
                *(x, y),
                s=16,
                marker=MARKERS[i % len(MARKERS)],
                facecolors=_colours()[i % 10] if full else "none",
                edgecolors=_colours()[i % 10],
                linewidths=0.8,
                label=name,
            )
        axes.set(title=f"layer {layer}", xticks=[], yticks=[], xlabel="1st component")
    first = upper.axes[0]
    first.set_ylabel("2nd component")
    handles, texts = first.get_legend_handles_labels()
    upper.legend(handles, texts, title="label", loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    left, right = lower.subplots(1, 2)
    layers = np.arange(len(found["accuracy"]))
    _curve(left, layers, found["accuracy"], 0, f"label of most of {found['neighbours']} neighbours")
    _level(left, found["chance"], "the most frequent label", ":")
    left.set(
        xlabel="layer", ylabel="labels found (share of texts)", title="nearest neighbours, leave one out", ylim=(0, 1)
    )
    _curve(right, layers, found["silhouette"], 1, "silhouette of the labels")
    _curve(right, layers, found["shuffled_silhouette"], 3, "the same with labels shuffled")
    # Room above and below, lest noise about 0 look like a finding.
    limits = min(-0.1, 1.2 * min(found["silhouette"])), max(0.1, 1.2 * max(found["silhouette"]))
    right.set(xlabel="layer", ylabel="silhouette (-1 to 1)", title="silhouette", ylim=limits)
    for axes in (left, right):
        _layer_ticks(axes, layers)
        _finish(axes)
    figure.suptitle(f"Core neurons of {found['texts']} labelled texts ($\\beta$ = {found['beta']:g})")
    return figure


def pairs(found: Mapping[str, Any]) -> "Figure":
    """One curve per file."""
    figure, axes = _panels(1, 1)
    for i, (name, own) in enumerate(found["files"].items()):
        layers = np.arange(len(own["layers"]))
        values = np.array([np.nan if value is None else value for value in own["layers"]])
        together = "constant" if own["all"] is None else f"{own['all']:.2f}"
        _curve(axes, layers, values, i, f"{name}: all layers together {together}")
        if own["same_tokens"] is not None:
            _level(
                axes, own["same_tokens"], f"{name}: tokens in common, no model", LINES[(i + 1) % 4], _colours()[i % 10]
            )
    _layer_ticks(axes, layers)
    axes.set(
        xlabel="layer",
        ylabel="Spearman correlation with people's scores",
        ylim=(min(0.0, axes.get_ylim()[0]), 1.05 * axes.get_ylim()[1]),
        title=f"Overlap of two sentences' core neurons, $\\beta$ = {found['beta']:g}",
    )
    _finish(axes)
    return figure


def recall(found: Mapping[str, Any]) -> "Figure":
    """Recall of both truths above, the stability figure below, over one axis of lengths."""
    figure, axes = _panels(2, 2, share_x=True, share_y="row", size=(11, 8))
    lengths, thresholds = found["prompt_tokens"], found["thresholds"]
    continuation = found["continuation_tokens"]
    panels = {
        "with_prompt": f"core neurons of prompt and {continuation} tokens after it",
        "continuation": f"core neurons of the {continuation} tokens alone",
    }
    for (truth, title), upper, lower in zip(panels.items(), *axes, strict=True):
        for i, (method, label) in enumerate(METHOD_LABELS.items()):
            _spread(upper, lengths, found["recall"][truth][method], i, label, middle="mean")
        _level(upper, found["chance"], "neurons at random", ":")
        upper.set(title=title, ylim=(0, 1))
        _spread(lower, lengths, found["stability_figure"], 3, "stability figure, median and quartiles")
        _level(lower, thresholds["least_stability"], f"auto: stable from {thresholds['least_stability']:g}", "--")
        lower.axvline(
            thresholds["least_tokens"],
            color="0.4",
            linestyle="-.",
            label=f"auto: from {thresholds['least_tokens']} tokens",
        )
        lower.set(xlabel="prompt (tokens)", ylim=(None, 1))
        _cross(upper, lower, found["crossover"][truth])
        _log_ticks(lower, lengths)
        for panel in (upper, lower):
            _finish(panel)
    axes[0][0].set_ylabel("recall (mean; quartiles of texts)")
    axes[1][0].set_ylabel("stability figure (0 chance, 1 equal)")
    figure.suptitle(
        f"What each way of predicting finds ($\\beta$ = {found['beta']:g}; {found['texts']} texts, "
        f"{len(found['group_sizes'])} groups of {found['grouped_texts']} others)"
    )
    return figure


def _cross(upper: "Axes", lower: "Axes", crossover: Mapping[str, float] | None) -> None:
    if crossover is None:
        return
    for axes in (upper, lower):
        axes.axvline(
            crossover["tokens"],
            color="0.75",
            linewidth=5,
            zorder=0,
            label="from here stability finds as much as similarity",
        )


def _panels(
    rows: int, columns: int, *, size: tuple[float, float] | None = None, share_x: Any = False, share_y: Any = False
) -> Any:
    """A figure and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size or (5.5 * columns if columns > 1 else 7, 4.6 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=share_x, sharey=share_y)


def _colours() -> list[str]:
    return [f"C{i}" for i in range(10)]


def _style(i: int) -> dict[str, Any]:
    """Curves differ in colour, marker and line, so that they can be told apart in black and white."""
    return {
        "color": f"C{i % 10}",
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": LINES[i % len(LINES)],
        "markersize": 5,
    }


def _curve(axes: "Axes", x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, i: int, label: str) -> None:
    axes.plot(x, y, label=label, linewidth=1.3, **_style(i))


def _spread(
    axes: "Axes",
    x: Sequence[float] | np.ndarray,
    values: Mapping[str, Any],
    i: int,
    label: str,
    middle: str = "median",
) -> None:
    """A curve of medians, or of means, with bars from quartile to quartile, on which a mean need not lie."""
    _curve(axes, x, values[middle], i, label)
    axes.vlines(x, values["lower_quartile"], values["upper_quartile"], colors=_style(i)["color"], linewidth=0.8)


def _level(axes: "Axes", y: float, label: str, line: str = "--", colour: str = "0.4") -> None:
    axes.axhline(y, color=colour, linestyle=line, linewidth=1, label=label)


def _finish(axes: "Axes") -> None:
    axes.grid(alpha=0.3)
    axes.legend(framealpha=0.85, edgecolor="none", fontsize=8)


def _log_ticks(axes: "Axes", ticks: Iterable[int] | np.ndarray) -> None:
    """A logarithmic axis of lengths that names those measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ticks), [str(tick) for tick in ticks])
    axes.minorticks_off()


def _layer_ticks(axes: "Axes", layers: np.ndarray) -> None:
    axes.set_xticks(layers[:: max(1, -(-len(layers) // 12))])


def _edges(centres: Sequence[float]) -> np.ndarray:
    """Borders [n + 1] of cells around `centres` [n]."""
    middles = (np.asarray(centres[1:]) + np.asarray(centres[:-1])) / 2
    return np.concatenate([centres[:1], middles, centres[-1:]])
