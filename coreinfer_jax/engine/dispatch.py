"""Decode steps, dispatch by dispatch: what one of them gives back, and the plain way, all steps on one set of weights.

The other way, which verifies drafts, is `coreinfer_jax.engine.lossless`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from coreinfer_jax.engine.programs import decode
from coreinfer_jax.engine.results import Drafting
from coreinfer_jax.engine.rows import Rows
from coreinfer_jax.engine.streamed import decode_streamed
from coreinfer_jax.model.cache import KVCache
from coreinfer_jax.model.host import is_on_host, mlp_bytes
from coreinfer_jax.model.weights import Params, leaf_bytes, weight_bytes_per_step
from coreinfer_jax.sparsity.choice import Chosen


@dataclass(frozen=True)
class Dispatch:
    """What has been made.

    Attributes:
        rows: the state after it.
        tokens: int32 [B, n], each row's new ones from the left.
        lengths: int32 [B], how many of the n belong to each row.
        steps: passes of the model so far.
        bytes_read_per_token: of weights and KV cache, over all passes so far.
        drafting: what has come of drafts so far, None where there are none.
        moved_bytes: of MLPs that stay on the host, what was moved to the device so far.
        chosen: core neurons that follow the text, those in use; None where the prompt's stay.
    """

    rows: Rows
    tokens: np.ndarray
    lengths: np.ndarray
    steps: int
    bytes_read_per_token: float
    drafting: Drafting | None = None
    moved_bytes: int = 0
    chosen: Chosen | None = None


def undrafted(weights: Params, rows: Rows, steps_per_dispatch: int) -> Iterator[Dispatch]:
    """Dispatches of up to so many decode steps of `weights`, until every row is done."""
    steps, read, streams = 0, bytes_read_per_token(weights, rows.cache), is_on_host(weights)
    moved = sum(mlp_bytes(layer.mlp) for layer in weights.layers) if streams else 0
    # Copies: on a CPU asarray would share the memory that the next dispatch is given to overwrite.
    lengths = np.array(rows.length)
    while not np.array(rows.done).all():
        if streams:
            rows, drawn, run = decode_streamed(weights, rows, steps_per_dispatch)
        else:
            rows, drawn, run = decode(weights, rows, np.int32(steps_per_dispatch))
        before, lengths, steps = lengths, np.array(rows.length), steps + int(run)
        tokens = np.array(drawn)[:, : int(run)]
        yield Dispatch(rows, tokens, lengths - before, steps, read, moved_bytes=moved * steps)


def bytes_read_per_token(params: Params, cache: KVCache) -> float:
    """Bytes a decode step reads, weights and the whole cache, divided by the B rows it makes a token for."""
    rows = cache.keys[0].shape[0]
    cached = sum(leaf_bytes(array) for array in cache.keys + cache.values)
    return (weight_bytes_per_step(params, rows) + cached) / rows
