"""What settings cost against what they read: a picture of an evaluation."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.files import check_new_file, new_file

MARKERS = "osD^vPX*<>"


def check_chart(path: Path) -> None:
    """Refuse early what could not be drawn at the end.

    Raises:
        CoreInferError: matplotlib is missing, an ending of no picture, a path that cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise CoreInferError("--chart draws: pip install 'coreinfer_jax[analyze]'")
    from matplotlib.figure import Figure

    if path.suffix.removeprefix(".").lower() not in Figure().canvas.get_supported_filetypes():
        raise CoreInferError(f"--chart {path}: {shown(path.suffix)} is no kind of picture; end it in .png or .svg")
    check_new_file(path)


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """KL divergence against bytes read per token, a line per rule, a panel per prompt length.

    Args:
        results: of `evaluate`.
        path: of a new picture, in a format that its ending names; see `check_chart`.

    Raises:
        CoreInferError: a path that cannot be written.
    """
    from matplotlib.figure import Figure

    lengths = list(dict.fromkeys(result["prompt_tokens"] for result in results))
    figure = Figure(figsize=(4.5 * len(lengths), 4.5), layout="constrained")
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)[0]
    for axes, length in zip(panels, lengths, strict=True):
        lines: dict[str, list[dict[str, Any]]] = {}
        for result in results:
            if result["prompt_tokens"] == length:
                lines.setdefault(title(result), []).append(result)
        for i, (name, points) in enumerate(lines.items()):
            ordered = sorted(points, key=lambda point: point["bytes_per_token"])
            megabytes = [point["bytes_per_token"] / 1e6 for point in ordered]
            low, high = zip(*(point["kl"]["ci95"] for point in ordered), strict=True)
            axes.plot(megabytes, [point["kl"]["mean"] for point in ordered], marker=MARKERS[i % 10], label=name)
            axes.fill_between(megabytes, low, high, alpha=0.15)
        axes.set(title=f"prompts of {length} tokens", xlabel="MB of weights read per token", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("KL(all neurons || kept), nats per token")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=2)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120)


def title(result: dict[str, Any]) -> str:
    """What a setting does, whatever it keeps."""
    parts = [result["rule"]]
    parts += [f"{result['compensation']:g} of the mean"] if result["compensation"] else []
    parts += ["no linear neurons"] if not result["linear"] else []
    parts += [f"prior {result['prior_tokens']:g}"] if result["prior_tokens"] else []
    parts += [f"alpha {result['alpha']:g}"] if "votes" in result["rule"] else []
    parts += ["layers alike"] if result["allocation"] == "equal" else []
    layers = tuple(result["layers"])
    return ", ".join(parts + ([f"layers {layers[0]:g} to {layers[1]:g}"] if layers != (0.0, 1.0) else []))
