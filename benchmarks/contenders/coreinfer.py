"""This library: the full model, or narrowed to core neurons that the prompt chooses."""

from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np

import coreinfer_jax as ci
from benchmarks.contenders.trial import Report, Trial
from benchmarks.shapes import random_prompts, shape_config, shape_params
from coreinfer_jax.engine.options import GREEDY
from coreinfer_jax.engine.programs import decode
from coreinfer_jax.engine.rows import first_drawn
from coreinfer_jax.engine.sampling import make_sampling
from coreinfer_jax.model.cache import bucket, cache_bytes, init_cache
from coreinfer_jax.model.weights import leaf_bytes, named_leaves, params_bytes


def run(trial: Trial) -> Report:
    """Load, generate once, then measure."""
    began = perf_counter()
    params = jax.block_until_ready(shape_params(shape_config(trial.fields), trial.dtype))
    loaded = perf_counter()
    # Random weights give no layer reason to keep more than another, and equal widths are those the tables count.
    core = None if trial.keep is None else ci.CoreConfig(beta=trial.keep, allocation="equal")
    prompts = random_prompts(params.config, trial.rows, trial.prompt_tokens)
    ci.generate(params, prompts, core, max_new_tokens=trial.new_tokens)
    first_call = perf_counter() - loaded
    outs, seconds = [], []
    for _ in range(trial.generations):
        called = perf_counter()
        outs.append(ci.generate(params, prompts, core, max_new_tokens=trial.new_tokens))
        seconds.append(perf_counter() - called)
    stats = [out.stats for out in outs]
    peak = device_bytes()  # before what else is looked at here takes memory of its own
    decoding = params if outs[-1].core is None else ci.compact(params, outs[-1].core)
    return Report(
        decode_seconds=[s.decode_seconds for s in stats],
        # Checks of the call and everything between the phases count as well; the gather comes after the first token.
        first_token_seconds=[
            whole - s.compaction_seconds - s.decode_seconds for whole, s in zip(seconds, stats, strict=True)
        ],
        made_tokens=[int(out.lengths.min()) for out in outs],
        load_seconds=loaded - began,
        first_call_seconds=first_call,
        bytes_per_token=stats[-1].bytes_read_per_token,
        prefill_seconds=[s.prefill_seconds for s in stats],
        selection_seconds=[s.selection_seconds for s in stats],
        compaction_seconds=[s.compaction_seconds for s in stats],
        temporary_bytes=_temporary_bytes(decoding, trial),
        device_bytes=peak,
        device_needed_bytes=_needed_bytes(params, decoding, trial),
    )


def device_bytes() -> int | None:
    """Most bytes in use on the accelerator so far; None on a CPU."""
    usage = jax.devices()[0].memory_stats()
    return None if usage is None else int(usage["peak_bytes_in_use"])


def _needed_bytes(params: ci.Params, decoding: ci.Params, trial: Trial) -> int:
    """Of the weights of `params`, of what `decoding` does not share with them, and of one cache."""
    whole = {id(leaf) for _, leaf in named_leaves(params)}
    own = sum(leaf_bytes(leaf) for _, leaf in named_leaves(decoding) if id(leaf) not in whole)
    capacity = bucket(trial.prompt_tokens + trial.new_tokens)
    return params_bytes(params) + own + cache_bytes(params.config, trial.rows, capacity, jnp.dtype(trial.dtype))


def _temporary_bytes(params: ci.Params, trial: Trial) -> int | None:
    """Bytes the decode program needs besides its arguments; None where the compiler does not say."""
    analysis = decode_program(params, trial).memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def decode_program(params: ci.Params, trial: Trial) -> jax.stages.Compiled:
    """The compiled program that decodes with `params` under the terms of `trial`."""
    config, rows = params.config, trial.rows
    cache = init_cache(config, rows, bucket(trial.prompt_tokens + trial.new_tokens), jnp.dtype(trial.dtype))
    first, logits = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, config.vocab_size), jnp.float32)
    state = first_drawn(cache, logits, first, first, make_sampling(config, rows, GREEDY, trial.new_tokens))
    return decode.lower(params, state, np.int32(1)).compile()
