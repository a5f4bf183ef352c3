"""What it costs that the next prompt belongs to another group: weights kept per group, gathered anew, or static.

All run decode steps of an OPT-125m shape (12 layers, random float32 weights) with one group's core neurons, or with
another group's than the step before.
"""

from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks.environment import environment, spread
from benchmarks.static_argument import KEEP, compacted_step, opt_125m, random_sets, static_step, timed
from coreinfer_jax import CoreNeurons, Params, compact
from coreinfer_jax.model.cache import KVCache, init_cache
from coreinfer_jax.model.weights import leaf_bytes

GROUPS = 4
ROUNDS = 24


def measure() -> dict[str, Any]:
    """First use of every group, then steps that stay with a group and steps that switch, all contenders in turn."""
    params = opt_125m()
    cache = init_cache(params.config, 1, 128, jnp.dtype("float32"))
    token = jnp.zeros((1, 1), jnp.int32)
    sets = random_sets(params, GROUPS)
    timed(compacted_step, compact(params, sets[0]), token, cache)
    kept = [compact(params, core) for core in sets]
    compiling = [timed(static_step, params, token, cache, core) for core in sets]
    steps: dict[str, list[float]] = {"stay": [], "switch": [], "gather": [], "static": []}
    for i in tqdm(range(ROUNDS), desc="steps", disable=None):
        group = i % GROUPS
        timed(compacted_step, kept[group - 1], token, cache)
        steps["switch"].append(timed(compacted_step, kept[group], token, cache))
        steps["stay"].append(timed(compacted_step, kept[group], token, cache))
        steps["gather"].append(timed(_gathered_step, params, token, cache, sets[group]))
        steps["static"].append(timed(static_step, params, token, cache, sets[group]))
    return environment() | {
        "benchmark": "group-switch",
        "model": "opt-125m shape",
        "layers": params.config.num_layers,
        "dtype": "float32",
        "keep": KEEP,
        "groups": GROUPS,
        "compile_seconds_per_group": spread(compiling),
        "bytes_per_group": _mlp_bytes(kept[0]),
        "step_milliseconds": {name: spread([1000 * s for s in seconds]) for name, seconds in steps.items()},
        "ratio_to_stay": {
            name: spread([a / b for a, b in zip(seconds, steps["stay"], strict=True)])
            for name, seconds in steps.items()
        },
    }


def _gathered_step(params: Params, token: Any, cache: KVCache, core: CoreNeurons) -> Any:
    return compacted_step(compact(params, core), token, cache)


def _mlp_bytes(narrowed: Params) -> int:
    """Bytes that a group takes beside the full model."""
    return sum(leaf_bytes(leaf) for layer in narrowed.layers for leaf in jax.tree.leaves(layer.mlp))
