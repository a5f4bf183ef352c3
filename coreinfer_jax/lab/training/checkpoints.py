"""A training run's checkpoint: one safetensors file, replaced whole."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from coreinfer_jax.errors import CoreInferError, shown_name
from coreinfer_jax.files import new_file, parse_json, read_back
from coreinfer_jax.io.held import HeldTensor, open_safetensors_file
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
        with read_back(path):
            load_state(partial, state)


def load_state(path: Path, like: TrainState) -> tuple[TrainState, History]:
    """The state, of the structure of `like`, and the history in `path`.

    Raises:
        CoreInferError: a file that is damaged or of another recipe.
    """
    leaves, structure = jax.tree.flatten_with_path(like)
    try:
        metadata, tensors = open_safetensors_file(path)
        arrays = [_read(tensors, jax.tree_util.keystr(place), leaf) for place, leaf in leaves]
        history = History(**parse_json(metadata[HISTORY]))
        state: TrainState = jax.tree.unflatten(structure, arrays)
        _check_history(history, int(state.step))
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = shown_name(str(error))
        raise CoreInferError(f"{path}: not a checkpoint of this run ({reason}); remove it to start over") from error
    return state, history


def _check_history(history: History, step: int) -> None:
    if len(history.losses) != step:
        raise ValueError(f"{len(history.losses)} losses after {step} steps")
    losses = [*history.losses, *(loss for record in history.records for loss in record["held_out"].values())]
    if not all(isinstance(value, float) for value in (*losses, history.seconds)):
        raise ValueError("its history holds something that is no number")


def _read(tensors: Mapping[str, HeldTensor], name: str, like: Any) -> jax.Array:
    stored = tensors.get(name)
    if stored is None:
        raise ValueError(f"{name} is missing")
    if stored.shape != like.shape or stored.dtype != like.dtype:
        raise ValueError(f"{name} is {stored.dtype} {list(stored.shape)}")
    return jnp.asarray(stored.read())
