"""A training run's checkpoint: one safetensors file, replaced whole."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from coreinfer_jax.errors import CoreInferError, shown_name
from coreinfer_jax.files import new_file
from coreinfer_jax.lab.training.recipe import TrainState

HISTORY = "history"


@dataclass
class History:
    """What a run has measured so far.

    Attributes:
        losses: of every step, in nats per token.
        records: at each measurement its `step` and `held_out`, the loss per text.
        seconds: spent in steps.
    """

    losses: list[float]
    records: list[dict[str, Any]]
    seconds: float


def save_state(path: Path, state: TrainState, history: History) -> None:
    """Replace `path` by the state and the history; a crash leaves the old file or the new one."""
    leaves, _ = jax.tree.flatten_with_path(state)
    arrays = {jax.tree_util.keystr(place): np.asarray(leaf) for place, leaf in leaves}
    with new_file(path) as partial:
        save_file(arrays, partial, metadata={HISTORY: json.dumps(asdict(history))})


def load_state(path: Path, like: TrainState) -> tuple[TrainState, History]:
    """The state, of the structure of `like`, and the history in `path`.

    Raises:
        CoreInferError: a file that is damaged or of another recipe.
    """
    leaves, structure = jax.tree.flatten_with_path(like)
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = [_read(file, jax.tree_util.keystr(place), leaf) for place, leaf in leaves]
            history = History(**json.loads(file.metadata()[HISTORY]))
        state: TrainState = jax.tree.unflatten(structure, arrays)
        _check_history(history, int(state.step))
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = shown_name(str(error))
        raise CoreInferError(f"{path}: not a checkpoint of this run ({reason}); remove it to start over") from error
    return state, history


def _check_history(history: History, step: int) -> None:
    if len(history.losses) != step:
        raise ValueError(f"{len(history.losses)} losses after {step} steps")
    losses = [*history.losses, *(loss for record in history.records for loss in record["held_out"].values())]
    if not all(isinstance(value, float) for value in (*losses, history.seconds)):
        raise ValueError("its history holds something that is no number")


def _read(file: Any, name: str, like: Any) -> jax.Array:
    array = file.get_tensor(name)
    if array.shape != like.shape or array.dtype != like.dtype:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
    return jnp.asarray(array)
