"""`forward`: logits of whole texts."""

import jax
import jax.numpy as jnp
from jax import Array
from numpy.typing import ArrayLike

from coreinfer_jax.checks import check_finite
from coreinfer_jax.engine.prompts import pad_prompts
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model import extend, observe_nothing, unembed
from coreinfer_jax.model.cache import KVCache, init_cache
from coreinfer_jax.model.host import check_on_device
from coreinfer_jax.model.shards import WHOLE, over_shards
from coreinfer_jax.model.weights import Params, check_params
from coreinfer_jax.sparsity.narrow import check_core, compact
from coreinfer_jax.sparsity.neurons import CoreNeurons


def forward(params: Params, tokens: ArrayLike, core: CoreNeurons | None = None) -> Array:
    """Logits of every position of whole texts, without padding or a cache to keep.

    Pure, so it can be compiled with the core neurons as a truly static argument,
    `jax.jit(forward, static_argnames="core")`: the indices become constants of the program, for study, export and
    tests. Decoding goes through `compact` instead, whose programs serve every set of the same size.

    Args:
        params: dense weights, or narrowed ones with `core` None.
        tokens: int [B, T].
        core: use only these neurons, at every position.

    Returns:
        float32 [B, T, V].

    Raises:
        CoreInferError: more tokens than positions, core neurons that do not fit. Where values can be seen, that is
            outside of a jit, also ids outside the vocabulary and logits that are NaN or infinite.
    """
    check_params(params)
    check_on_device(params, "forward")
    if not isinstance(tokens, jax.core.Tracer):
        lengths = pad_prompts(tokens, params.config).lengths
        if lengths.max() != lengths.min():
            raise CoreInferError("tokens: rows of unequal lengths; `forward` takes one length, `generate` takes any")
    ids = jnp.asarray(tokens, jnp.int32)
    if ids.shape[1] > params.config.max_positions:
        raise CoreInferError(f"{ids.shape[1]} tokens exceed the model's {params.config.max_positions} positions")
    if core is not None:
        check_core(core)
        core.check_rows(ids.shape[0])
        params = compact(params, core)
    params = params.weights
    sets = {layer.mlp.up.rows for layer in params.layers if layer.mlp.up.rows is not None}
    if sets - {ids.shape[0]}:
        raise CoreInferError(f"params are narrowed for {min(sets)} rows, but tokens have {ids.shape[0]}")
    logits = _logits(params, ids)
    if not isinstance(logits, jax.core.Tracer):
        check_finite(jnp.isfinite(logits).all())
    return logits


@jax.jit
def _logits(params: Params, tokens: Array) -> Array:
    B, T = tokens.shape
    cache = init_cache(params.config, B, T, params.dtype, params.mesh)
    return over_shards(_read_all, params.mesh, results=WHOLE)(params, tokens, cache)


def _read_all(params: Params, tokens: Array, cache: KVCache) -> Array:
    hidden, _, _ = extend(params, tokens, cache, jnp.zeros(len(tokens), jnp.int32), observe_nothing)
    return unembed(params, hidden)
