"""The loss curve: as numbers, and as people like to see it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.files import new_file
from coreinfer_jax.lab.training.checkpoints import History
from coreinfer_jax.lab.training.recipe import Recipe

LOSS_JSON, LOSS_PNG = "loss.json", "loss.png"

# Steps averaged for the smooth curve.
SMOOTHED = 25


def require_matplotlib() -> None:
    """Refuse early what could not be drawn at the end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CoreInferError("train draws a loss curve: pip install 'coreinfer_jax[train]'") from error


def show_curve(run: Path, history: History, recipe: Recipe) -> None:
    """Write loss.json and loss.png of `history` into `run`."""
    with new_file(run / LOSS_JSON) as partial:
        partial.write_text(json.dumps(asdict(history)) + "\n", encoding="utf-8")
    sizes = f"{recipe.num_layers} layers, D {recipe.hidden_size}, F {recipe.mlp_size}"
    with new_file(run / LOSS_PNG) as partial:
        draw_curve(partial, history.losses, history.records, f"{recipe.family}: {sizes}")


def draw_curve(path: Path, losses: Sequence[float], records: Sequence[Mapping[str, Any]], title: str) -> None:
    """Write a PNG of the training loss per step and of the held-out losses of `records`, in nats per token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.8", linewidth=0.8, label="training, each step")
    if len(losses) >= 2 * SMOOTHED:
        smooth = np.convolve(losses, np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")
        axes.plot(steps[SMOOTHED - 1 :], smooth, color="0.4", linewidth=1.2, label=f"training, mean of {SMOOTHED}")
    markers = cycle("osD^v")  # so that the curves differ in black and white
    for name in records[0]["held_out"] if records else ():
        points = [(record["step"], record["held_out"][name]) for record in records]
        final = points[-1][1]
        axes.plot(
            *zip(*points, strict=True), marker=next(markers), markersize=4, label=f"held out, {name}: {final:.2f}"
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=120)
