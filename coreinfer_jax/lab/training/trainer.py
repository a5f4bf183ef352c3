"""A training run: a directory that is prepared once, continued after any interruption, and ends in a model."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import jax
import numpy as np
from tqdm import tqdm

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.files import alone, to_path
from coreinfer_jax.lab.training.checkpoints import History, load_state, save_state
from coreinfer_jax.lab.training.curve import require_matplotlib, show_curve
from coreinfer_jax.lab.training.outcome import write_model
from coreinfer_jax.lab.training.preparation import CHECKPOINT, TOKENS, prepare, read_texts
from coreinfer_jax.lab.training.recipe import (
    Recipe,
    TrainState,
    held_out_loss,
    initial_params,
    initial_state,
    model_config,
    train_step,
)
from coreinfer_jax.lab.training.trainable import TRAINABLE
from coreinfer_jax.lab.training.windows import batch, held_out_windows, load_tokens
from coreinfer_jax.model.weights import Params

MODEL = "model"

# Steps between checkpoints, and between measurements of the held-out loss.
CHECKPOINT_EVERY = 50
MEASURE_EVERY = 200


def train(
    directory: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]],
    recipe: Recipe,
    init_from: str | os.PathLike[str] | None = None,
) -> Path:
    """Train a small model on text files, or continue a run that was interrupted.

    On a CPU the weights are the same, bit for bit on one machine and one set of versions, however often the run is
    interrupted.

    Args:
        directory: of the run. New: tokenizer and tokens are made there first. Existing: continued, if made with the
            same recipe, the same texts in the same order and the same first weights. Holds checkpoint.safetensors,
            loss.json, loss.png and, at the end, model/.
        texts: UTF-8 files whose documents are ended by lines `<|endoftext|>`; every 100th document is held out. Each
            file is read equally often, whatever its length.
        recipe: sizes, schedule, seed.
        init_from: a model of the recipe's sizes, as `load` takes it, whose weights and tokenizer to train further;
            None begins with random weights and a tokenizer of its own.

    Returns:
        The path of model/, a Hugging Face directory in bfloat16 with its tokenizer and training.json, which states
        what it was trained on, for how long and how well, also of the run it began from.

    Raises:
        CoreInferError: texts that cannot be used, a directory of another run, an `init_from` of other sizes, a loss
            that is not finite.
    """
    require_matplotlib()
    if not isinstance(recipe, Recipe):
        raise CoreInferError(f"recipe={shown(recipe)}: give a coreinfer_jax.lab.training.Recipe")
    run = to_path(directory)
    sources = read_texts(texts)
    first = prepare(run, sources, recipe, init_from)
    model = run / MODEL
    with alone(run, "training"):
        if not model.exists():
            state, history = _continue(run, recipe, [source.name for source in sources], first)
            write_model(model, run, state.params, history, recipe, sources)
    return model


def _continue(run: Path, recipe: Recipe, names: Sequence[str], first: Params | None) -> tuple[TrainState, History]:
    """Take the steps that are left."""
    bos = TRAINABLE[recipe.family].bos_id
    tokens = load_tokens(run / TOKENS, [f"{name}/{part}" for name in names for part in ("train", "held_out")], recipe)
    files = [tokens[f"{name}/train"] for name in names]
    held_out = {name: held_out_windows(tokens[f"{name}/held_out"], recipe.sequence, bos) for name in names}
    state, history = _latest(run, recipe, first)

    begun = int(state.step)
    before, began = history.seconds, perf_counter()
    with tqdm(initial=begun, total=recipe.steps, desc="training", unit="step", disable=None) as bar:
        for step in range(begun, recipe.steps):
            state, loss = train_step(state, batch(files, step, recipe, bos), recipe)
            history.losses.append(_finite(float(loss), step))
            history.seconds = before + perf_counter() - began
            done = step + 1
            speed = (done - begun) * recipe.batch * recipe.sequence / (perf_counter() - began)
            bar.set_postfix_str(f"loss {history.losses[-1]:.3f}, {speed:.0f} tokens/s", refresh=False)
            bar.update()
            if done % MEASURE_EVERY == 0 or done == recipe.steps:
                losses = {name: _finite(_held_out(state, windows, recipe), step) for name, windows in held_out.items()}
                history.records.append({"step": done, "held_out": losses})
                left = tqdm.format_interval((recipe.steps - done) * recipe.batch * recipe.sequence / speed)
                tqdm.write(f"step {done}: {_told(losses)}; {speed:.0f} tokens/s, {left} left", file=sys.stderr)
            if done % CHECKPOINT_EVERY == 0 or done == recipe.steps:
                # The curve first: a run killed between the two repeats its steps and draws it again.
                show_curve(run, history, recipe)
                save_state(run / CHECKPOINT, state, history)
    return state, history


def _told(losses: Mapping[str, float]) -> str:
    return "held out " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


def _latest(run: Path, recipe: Recipe, first: Params | None) -> tuple[TrainState, History]:
    """The state and history of the last checkpoint, or those of a run that begins: with `first`, if given."""
    path = run / CHECKPOINT

    def beginning() -> TrainState:
        params = initial_params(model_config(recipe), recipe.seed) if first is None else first
        return initial_state(recipe, params)

    if not path.exists():
        return beginning(), History([], [], 0.0)
    return load_state(path, jax.eval_shape(beginning))


def _finite(loss: float, step: int) -> float:
    if not np.isfinite(loss):
        raise CoreInferError(
            f"the loss of step {step + 1} is {loss}; begin again in a new directory with a lower learning rate"
        )
    return loss


def _held_out(state: TrainState, windows: np.ndarray, recipe: Recipe) -> float:
    """Mean loss over `windows`, in batches of the step's size so that a window costs as much memory as there."""
    groups = [windows[i : i + recipe.batch] for i in range(0, len(windows), recipe.batch)]
    losses = [float(held_out_loss(state.params, group, recipe)) for group in groups]
    return float(np.average(losses, weights=[len(group) for group in groups]))
