"""What the methods of prediction cost beside plain stability, with the embedded models and an OPT-125m shape.

The groups are made up, which changes no shape. The time is that of prefill, selection and compaction, all that comes
before the first decode step; the methods take turns.
"""

from typing import Any

import numpy as np
from tqdm import tqdm

import coreinfer_jax as ci
from benchmarks.environment import environment, spread
from benchmarks.static_argument import opt_125m
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.sparsity.choice import Chooser

GROUPS = 4
ROUNDS = 15
PROMPT_LENGTHS = (16, 64, 256)
CORE = ci.CoreConfig(beta=0.4, allocation="equal")
SETTINGS: dict[str, Chooser] = {
    "stability": CORE,
    "auto, stable": ci.Auto(beta=CORE.beta, least_stability=-1.0, least_tokens=2),
    "auto, unstable": ci.Auto(beta=CORE.beta, least_stability=1.0),
    "similarity": ci.Similarity(gamma=CORE.beta),
    "fused": ci.Fused(beta=CORE.beta),
}


def measure() -> dict[str, Any]:
    """Seconds before the first decode step, and ratios to those of stability in the same round."""
    models = {"opt-125m shape": opt_125m()} | {
        f"embedded:{name}": ci.load(f"embedded:{name}", "float32")[0] for name in ("opt", "llama")
    }
    return environment() | {
        "benchmark": "prediction",
        "keep": CORE.beta,
        "groups": GROUPS,
        "rounds": ROUNDS,
        "models": {name: _model(name, params) for name, params in models.items()},
    }


def _model(name: str, params: ci.Params) -> dict[str, Any]:
    groups = ci.prepare_groups(params, _made_up(params), ci.Similarity(gamma=CORE.beta))
    return {
        str(length): _length(params, groups, length)
        for length in tqdm(PROMPT_LENGTHS, desc=name, unit="length", disable=None)
    }


def _made_up(params: ci.Params) -> ci.Clusters:
    rng, config = np.random.default_rng(0), params.config
    return ci.Clusters(
        frequencies=rng.random((GROUPS, config.num_layers, config.mlp_size), np.float32),
        centroids=rng.random((GROUPS, config.mlp_size), np.float32),
        names=tuple(f"group {c}" for c in range(GROUPS)),
        sizes=(1,) * GROUPS,
        layer=config.num_layers - 1,
        vectors=ci.TextVectors(),
        origin="k-means",
        fingerprint=fingerprint(params),
    )


def _length(params: ci.Params, groups: ci.Groups, length: int) -> dict[str, Any]:
    rng = np.random.default_rng(length)
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for warm in (False, *[True] * ROUNDS):
        tokens = [rng.integers(4, params.config.vocab_size, length).tolist()]
        for name, core in SETTINGS.items():
            spent = _seconds(params, tokens, core, None if name == "stability" else groups)
            if warm:  # the first round compiled
                seconds[name].append(spent)
    return {
        name: {
            "milliseconds": spread([1000 * s for s in own]),
            "ratio": spread([a / b for a, b in zip(own, seconds["stability"], strict=True)]),
        }
        for name, own in seconds.items()
    }


def _seconds(params: ci.Params, tokens: list[list[int]], core: Chooser, groups: ci.Groups | None) -> float:
    """Prefill, selection and compaction of a prompt."""
    # The gather is for the second token.
    stats = ci.generate(params, tokens, core, groups=groups, max_new_tokens=2).stats
    return stats.prefill_seconds + stats.selection_seconds + stats.compaction_seconds
