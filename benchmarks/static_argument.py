"""Two ways to decode with core neurons: as a static argument of the step, or as compacted weights.

Both run one decode step of an OPT-125m shape (12 layers, random float32 weights) for prompts with different core
neurons. The static form compiles a program per set and gathers from the full weights in every step; the compacted form
gathers once per prompt and runs every set through one program.
"""

from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from benchmarks.environment import environment, spread
from benchmarks.shapes import SHAPES, shape_config, shape_params
from coreinfer_jax import CoreNeurons, Params, compact
from coreinfer_jax.model import extend, observe_nothing, unembed
from coreinfer_jax.model.cache import KVCache, init_cache
from coreinfer_jax.sparsity.votes import kept_neurons

KEEP = 0.4
SETS = 3
STEPS = 20


def _step(params: Params, token: Array, cache: KVCache) -> Array:
    hidden, _, _ = extend(params, token, cache, jnp.full(1, 100, jnp.int32), observe_nothing)
    return unembed(params, hidden)


@jax.jit
def compacted_step(params: Params, token: Array, cache: KVCache) -> Array:
    """Logits [1, 1, V] of one decode step, for dense or compacted weights."""
    return _step(params, token, cache)


@partial(jax.jit, static_argnames="core")
def static_step(params: Params, token: Array, cache: KVCache, core: CoreNeurons) -> Array:
    """The same with the core neurons as constants of the program."""
    return _step(compact(params, core), token, cache)


def opt_125m() -> Params:
    """Random float32 weights."""
    return shape_params(shape_config(SHAPES["opt-125m"]), "float32")


def random_sets(params: Params, number: int) -> list[CoreNeurons]:
    """Sets of core neurons that have nothing in common but their size."""
    config, rng = params.config, np.random.default_rng(0)
    kept = kept_neurons(KEEP, config.mlp_size)
    return [
        CoreNeurons(np.sort(rng.choice(config.mlp_size, kept, replace=False)) for _ in range(config.num_layers))
        for _ in range(number)
    ]


def timed(function: Any, *arguments: Any) -> float:
    """Seconds of one awaited call."""
    began = perf_counter()
    jax.block_until_ready(function(*arguments))
    return perf_counter() - began


def measure() -> dict[str, Any]:
    """First calls with each of several sets, then single steps of all contenders in turn."""
    params = opt_125m()
    config = params.config
    cache = init_cache(config, 1, 128, jnp.dtype("float32"))
    token = jnp.zeros((1, 1), jnp.int32)
    sets = random_sets(params, SETS)
    first: dict[str, list[float]] = {"static": [], "compact": [], "compacted": []}
    for core in sets:
        first["static"].append(timed(static_step, params, token, cache, core))
        first["compact"].append(timed(compact, params, core))
        first["compacted"].append(timed(compacted_step, compact(params, core), token, cache))
    narrow = compact(params, sets[0])
    timed(compacted_step, params, token, cache)
    steps: dict[str, list[float]] = {"dense": [], "static": [], "compacted": []}
    for _ in tqdm(range(STEPS), desc="steps", disable=None):
        steps["dense"].append(timed(compacted_step, params, token, cache))
        steps["static"].append(timed(static_step, params, token, cache, sets[0]))
        steps["compacted"].append(timed(compacted_step, narrow, token, cache))
    return {
        "benchmark": "static-argument",
        "model": "opt-125m shape",
        "layers": config.num_layers,
        "dtype": "float32",
        "keep": KEEP,
        "first_call_seconds": first,
        "step_milliseconds": {name: spread([1000 * s for s in seconds]) for name, seconds in steps.items()},
        **environment(),
    }
