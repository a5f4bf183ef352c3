"""Requests that come and go over one running state: each is prefilled alone and put into a row of it.

`generate` needs none of this, as all of its rows begin together; a scheduler does.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.checks import check_finite
from coreinfer_jax.engine.loop import Begun
from coreinfer_jax.engine.options import GREEDY
from coreinfer_jax.engine.programs import decode, insert, insert_mlps
from coreinfer_jax.engine.rows import Rows
from coreinfer_jax.engine.sampling import make_sampling, with_keys
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.cache import init_cache
from coreinfer_jax.model.host import check_on_device
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.narrow import check_linear, narrow, on_device
from coreinfer_jax.sparsity.neurons import CoreNeurons


@dataclass(frozen=True)
class Running:
    """A state of B rows, each free or at work on a request of its own. `insert_request` and `advance` use it up.

    Attributes:
        params: the model, dense.
        weights: what a decode step reads: the same for all rows, or narrowed per row.
        widths: neurons kept per layer, F where a layer is dense; None where all rows read the full model.
        linear: per layer, whether linear neurons stand beside them.
        rows: the state.
    """

    params: Params
    weights: Params
    widths: tuple[int, ...] | None
    linear: tuple[bool, ...]
    rows: Rows


def start(
    params: Params,
    rows: int,
    capacity: int,
    widths: tuple[int, ...] | None = None,
    linear: tuple[bool, ...] | None = None,
    *,
    draws: bool = True,
    looks_back: bool = True,
) -> Running:
    """A state of free rows.

    Args:
        params: dense weights.
        rows: B.
        capacity: positions per row (S): prompt and new tokens together.
        widths: neurons kept per layer by the requests to come, F in layers that they leave dense; None for requests
            that run the full model.
        linear: per layer, whether the linear neurons of the model's calibration stand beside these, as in the requests'
            core neurons; None for nowhere.
        draws: whether requests to come may draw at a temperature; greedy ones alone are a cheaper program.
        looks_back: whether they may have penalties of repetition, which ask for the tokens of the rows' texts.

    Raises:
        CoreInferError: linear neurons that the calibration does not have.
    """
    check_on_device(params, "a running state")
    linear = (False,) * params.config.num_layers if linear is None else linear
    check_linear(params, linear)
    config, weights = params.config, params.weights
    if uneven := [width for width in widths or () if width % params.shards]:
        raise CoreInferError(f"widths: {uneven[0]} neurons cannot be shared equally by {params.shards} devices")
    if widths is not None:
        narrowed = [None if width == config.mlp_size else width for width in widths]
        indices = tuple(None if width is None else jnp.zeros((rows, width), jnp.int32) for width in narrowed)
        D = config.hidden_size
        offsets = tuple(None if width is None else jnp.zeros((rows, D), jnp.float32) for width in narrowed)
        weights = narrow(params, indices, offsets, linear)
    sampling = make_sampling(config, rows, GREEDY, 0)
    # Arrays of their own: `insert` is given the memory of each.
    free = Rows(
        cache=init_cache(config, rows, capacity, params.dtype, params.mesh),
        token=jnp.zeros(rows, jnp.int32),
        position=jnp.zeros(rows, jnp.int32),
        length=jnp.zeros(rows, jnp.int32),
        done=jnp.ones(rows, bool),
        finite=jnp.ones(rows, bool),
        sampling=with_keys(sampling) if draws else sampling,
        history=jnp.zeros((rows, capacity), jnp.int32) if looks_back else None,
    )
    return Running(params, weights, widths, linear, free)


def insert_request(running: Running, row: int, begun: Begun) -> Running:
    """`running` with a request of one row, from `begin`, in row `row`; no other row changes, nothing is retraced.

    Raises:
        CoreInferError: a row that there is not, a request of several rows, of other numbers of neurons per layer, of
            more positions than the state has, or one that draws or has penalties where the state is for none that do.
    """
    rows, capacity = running.rows.token.shape[0], running.rows.cache.capacity
    if not 0 <= row < rows:
        raise CoreInferError(f"row={row}: there are rows 0 .. {rows - 1}")
    if begun.rows.token.shape[0] != 1:
        raise CoreInferError(f"a request of {begun.rows.token.shape[0]} rows: begin each row alone")
    if begun.rows.cache.capacity > capacity:
        raise CoreInferError(
            f"the request has {begun.rows.cache.capacity} positions, the state {capacity}: start one with more"
        )
    rope = running.params.config.rope
    if rope is not None and rope.is_long(capacity) != rope.is_long(begun.rows.cache.capacity):
        raise CoreInferError(
            f"the request has {begun.rows.cache.capacity} positions, the state {capacity}, and beyond "
            f"{rope.original_max_positions} this model rotates otherwise: start a state on the same side"
        )
    core = begun.chosen.core
    widths = None if core is None else core.kept(running.params.config.mlp_size)
    if widths != running.widths:
        raise CoreInferError(f"the request keeps {widths} neurons per layer, the state {running.widths}: start another")
    if core is not None and _padded_sets(begun):
        raise CoreInferError(
            "core neurons that were given lie unevenly on the devices: rows that come and go need as many on each"
        )
    if core is not None and core.linear != running.linear:
        raise CoreInferError(
            f"the request has linear neurons in layers {_where(core.linear)}, the state in {_where(running.linear)}: "
            "start another"
        )
    one = _as_in(running.rows, begun.rows)
    weights = running.weights if core is None else _with_set(running, row, core)
    return replace(running, weights=weights, rows=insert(running.rows, np.int32(row), one))


def _as_in(rows: Rows, one: Rows) -> Rows:
    """`one`, a request of one row, with keys and a history where `rows` have them."""
    draws, looks_back = rows.sampling.key is not None, rows.history is not None
    if one.sampling.key is not None and not draws:
        raise CoreInferError("the request draws, the state is for greedy ones: start one with draws=True")
    if one.history is not None and not looks_back:
        raise CoreInferError("the request has penalties, the state is for none: start one with looks_back=True")
    if draws:
        one = replace(one, sampling=with_keys(one.sampling))
    return replace(one, history=_history(one)) if looks_back else one


def _padded_sets(begun: Begun) -> bool:
    """Whether devices have different numbers of a set's neurons, so that some are filled up."""
    core, indices = begun.chosen.core, begun.chosen.indices or ()
    assert core is not None, "there is a set"
    pairs = zip(core.layers, indices, strict=False)
    return any(own is not None and there is not None and own.shape[-1] != there.shape[-1] for own, there in pairs)


def _history(rows: Rows) -> Array:
    """The history of a request's only row, zeros where it looks at none."""
    return jnp.zeros((1, rows.cache.capacity), jnp.int32) if rows.history is None else rows.history


def _where(linear: tuple[bool, ...]) -> list[int]:
    return [l for l, there in enumerate(linear) if there]


def _with_set(running: Running, row: int, core: CoreNeurons) -> Params:
    """The weights of `running`, in row `row` those of the single set `core`."""
    indices, offsets = on_device(running.params, core)
    nothing = jnp.zeros(running.params.config.hidden_size, jnp.float32)
    narrowed = [l for l, own in enumerate(indices) if own is not None]
    # A state has offsets in any case, so that requests with and without them fit.
    filled = tuple(nothing if l in narrowed and own is None else own for l, own in enumerate(offsets))
    one = narrow(running.params, indices, filled, running.linear)
    before, own = ([params.layers[l].mlp for l in narrowed] for params in (running.weights, one))
    after = dict(zip(narrowed, insert_mlps(before, np.int32(row), own), strict=True))
    layers = tuple(
        replace(layer, mlp=after[l]) if l in after else layer for l, layer in enumerate(running.weights.layers)
    )
    return replace(running.weights, layers=layers)


def advance(running: Running, steps: int) -> tuple[Running, np.ndarray, np.ndarray]:
    """Up to `steps` decode steps, at most 64, fewer once no row is at work.

    Returns:
        The state; tokens int32 [B, n]; and int32 [B], how many of these n are each row's new ones, the first of them.
    """
    before = np.array(running.rows.length)
    rows, drawn, run = decode(running.weights, running.rows, np.int32(steps))
    check_finite(np.array(rows.finite).all())
    return replace(running, rows=rows), np.array(drawn)[:, : int(run)], np.array(rows.length) - before
