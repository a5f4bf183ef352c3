"""How the cost of a generation grows with one thing at a time: prompt, output, layers, keep ratio, batch."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

import coreinfer_jax as ci
from benchmarks.environment import environment, spread
from benchmarks.shapes import random_prompts, shape_config, shape_fields, shape_params
from coreinfer_jax.engine.options import GREEDY
from coreinfer_jax.engine.programs import no_sums, prefill
from coreinfer_jax.engine.sampling import make_sampling
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.cache import bucket, init_cache
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choosers import chooser_for

# Settings that are compared at every point: what decodes there.
DENSE, CORE, SHARED = "dense", "core neurons", "core neurons, one set for all rows"


@dataclass(frozen=True)
class Point:
    """Where a generation is measured.

    Attributes:
        prompt_tokens: per row.
        new_tokens: per row.
        layers: of the model.
        keep: share of neurons of those settings that narrow.
        rows: batch size.
    """

    prompt_tokens: int = 64
    new_tokens: int = 32
    layers: int = 0
    keep: float = 0.4
    rows: int = 1


# By the name of a sweep: the field of `Point` that grows, through which values, under which settings.
AXES: dict[str, tuple[str, tuple[Any, ...], tuple[str, ...]]] = {
    "prompt-tokens": ("prompt_tokens", (16, 32, 64, 128, 256, 512, 1024), (DENSE, CORE)),
    "new-tokens": ("new_tokens", (8, 16, 32, 64, 128, 256), (DENSE, CORE)),
    "layers": ("layers", (1, 2, 4, 6, 8, 10, 12), (DENSE, CORE)),
    "keep": ("keep", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (DENSE, CORE)),
    "rows": ("rows", (1, 2, 4, 8, 16), (DENSE, CORE, SHARED)),
}


def measure(over: str, model: str, layers: int | None, dtype: str, rounds: int) -> dict[str, Any]:
    """One result: every point of the sweep `over` under every setting, all in turn, `rounds` times.

    Raises:
        CoreInferError: an unknown model, or fewer than one round.
    """
    if rounds < 1:
        raise CoreInferError(f"--rounds {rounds}: give at least 1")
    config = shape_config(shape_fields(model, layers))
    params = shape_params(config, dtype)
    name, values, settings = AXES[over]
    whole = Point(layers=config.num_layers)
    points = [point for value in values if _fits(point := replace(whole, **{name: value}), config)]
    made_on = environment()
    turns = [(point, setting) for point in points for setting in settings]
    for point, setting in tqdm(turns, desc=f"{over}: compiling", disable=None):
        _generation(params, point, setting)
    measured: dict[tuple[Point, str], list[ci.Stats]] = {turn: [] for turn in turns}
    for point, setting in tqdm(turns * rounds, desc=over, disable=None):
        measured[point, setting].append(_generation(params, point, setting))
    return made_on | {
        "benchmark": "sweep",
        "over": over,
        "model": model,
        "layers": config.num_layers,
        "model_layers": shape_config(shape_fields(model, None)).num_layers,
        "dtype": dtype,
        "rounds": rounds,
        "points": [_result(params, point, setting, stats) for (point, setting), stats in measured.items()],
    }


def _fits(point: Point, config: ModelConfig) -> bool:
    return point.layers <= config.num_layers and point.prompt_tokens + point.new_tokens <= config.max_positions


def _generation(params: Params, point: Point, setting: str) -> ci.Stats:
    prompts = random_prompts(params.config, point.rows, point.prompt_tokens)
    core = _core(point, setting)
    return ci.generate(_cut(params, point.layers), prompts, core, max_new_tokens=point.new_tokens).stats


def _core(point: Point, setting: str) -> ci.CoreConfig | None:
    if setting == DENSE:
        return None
    return ci.CoreConfig(beta=point.keep, per_row=setting != SHARED, allocation="equal")


def _cut(params: Params, layers: int) -> Params:
    """The first `layers` layers of a model, which share its memory."""
    return replace(params, layers=params.layers[:layers], config=replace(params.config, num_layers=layers))


def _result(params: Params, point: Point, setting: str, stats: Sequence[ci.Stats]) -> dict[str, Any]:
    def over(seconds: Callable[[ci.Stats], float]) -> dict[str, float]:
        return spread([seconds(one) for one in stats])

    return {
        **asdict(point),
        "setting": setting,
        "prefill_seconds": over(lambda s: s.prefill_seconds),
        "selection_seconds": over(lambda s: s.selection_seconds),
        "compaction_seconds": over(lambda s: s.compaction_seconds),
        "decode_ms_per_step": over(lambda s: 1000 * s.decode_seconds / s.decode_steps),
        "total_seconds": over(_total),
        "bytes_per_token": stats[0].bytes_read_per_token,
        "prefill_temporary_bytes": _prefill_temporaries(_cut(params, point.layers), point, setting),
    }


def _total(stats: ci.Stats) -> float:
    return stats.prefill_seconds + stats.selection_seconds + stats.compaction_seconds + stats.decode_seconds


def _prefill_temporaries(params: Params, point: Point, setting: str) -> int | None:
    """Bytes the prefill program needs besides its arguments: what observing adds is their difference."""
    config, rows = params.config, point.rows
    lengths = np.full(rows, point.prompt_tokens, np.int32)
    padded = np.zeros((rows, bucket(point.prompt_tokens)), np.int32)
    chooser = chooser_for(params, _core(point, setting))
    observed = chooser.observed_layers(config, None)
    observer = chooser.observer(chooser.counted(padded, lengths, 0, config), params)
    capacity = bucket(point.prompt_tokens + point.new_tokens)
    lowered = prefill.lower(
        params,
        padded,
        lengths,
        np.zeros(rows, np.int32),
        init_cache(config, rows, capacity, params.dtype),
        [] if observer is None else no_sums(observer, params.layers[0], padded, layers=len(observed)),
        make_sampling(config, rows, GREEDY, point.new_tokens),
        observer,
        observed=observed,
        filled=padded.shape[1],
    )
    analysis = lowered.compile().memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)
