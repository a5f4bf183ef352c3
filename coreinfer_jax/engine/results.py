"""What a generation gives back: tokens, the core neurons behind them, and what it cost."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from coreinfer_jax.sparsity.choice import Choice, Method
from coreinfer_jax.sparsity.moving import NOTHING, DeviceRows
from coreinfer_jax.sparsity.neurons import CoreNeurons

# What chose the rows' neurons; `mixed` where it differs between the rows of a batch.
Ran = Method | Literal["mixed"]


@dataclass(frozen=True)
class Stats:
    """What a generation did and what it cost.

    Seconds are wall-clock, each phase awaited; the first call of a shape includes compiling its programs.

    Attributes:
        method: `dense`; `given` (the caller's core neurons); `stability`, `similarity` or `fused` (predicted from the
            prompt); `mixed` where `auto` chose differently for the rows of a batch.
        choices: per row, or once for all rows that share a set, what ran, why, the stability figure and the group.
        kept_neurons: neurons per layer that the decode steps use, F where a layer is dense.
        mlp_size: F, the number of MLP neurons per layer.
        prompt_tokens: per row.
        cached_tokens: per row, how many of these were in the KV cache already; above 0 only in `converse`.
        prefill_seconds: the full model over the prompt, its neurons summed up, and the first token.
        selection_seconds: sums to indices and offsets.
        compaction_seconds: the gather of the narrowed weights, after the first token; 0 before it.
        decode_seconds: all decode steps so far.
        decode_steps: passes of the narrowed model so far; each makes one token per unfinished row.
        bytes_read_per_token: weights and KV cache one decode step reads, with what pads widths on accelerators,
            divided by the rows it serves.
        moved_bytes: of MLPs that stay on the host, what was moved to the device so far; 0 where all weights are there.
    """

    method: Ran
    choices: tuple[Choice, ...]
    kept_neurons: tuple[int, ...]
    mlp_size: int
    prompt_tokens: tuple[int, ...]
    cached_tokens: tuple[int, ...]
    prefill_seconds: float
    selection_seconds: float
    compaction_seconds: float
    decode_seconds: float
    decode_steps: int
    bytes_read_per_token: float
    moved_bytes: int = 0


@dataclass(frozen=True)
class Chunk:
    """Newly generated tokens.

    Attributes:
        tokens: int32 [B, n]; a row that is complete holds the fill id.
        lengths: int32 [B], how many of the n belong to each row.
        core: the core neurons in use, None when dense.
        stats: costs up to and including this chunk.
        device_rows: of MLPs that stay on the host, what is on the device; the next chunk's, or a later call that is
            given them, may use them up.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    core: CoreNeurons | None
    stats: Stats
    device_rows: DeviceRows = NOTHING


@dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    Attributes:
        tokens: int32 [B, max_new_tokens], new tokens only; after a row's length it holds `fill_id`.
        lengths: int32 [B], new tokens per row, an EOS counted.
        fill_id: the model's padding id, or 0 when it has none.
        core: the core neurons used, None when dense.
        stats: costs.
        device_rows: what it left on the device of MLPs that stay on the host, for the `device_rows` of a later call:
            that moves only what it lacks. Their memory is theirs as long as they are.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    fill_id: int
    core: CoreNeurons | None
    stats: Stats
    device_rows: DeviceRows = NOTHING
