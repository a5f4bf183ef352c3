"""Neurons predicted anew for every token, as Deja Vu (arXiv 2310.17157) and PowerInfer (arXiv 2312.12456) do.

Per layer a low-rank predictor scores the MLP's neurons from its input, and the weights of the K best are gathered for
this one token. Random predictors serve: what is measured is their time and memory, and that of changing the neurons.
Down projections are stored neuron by neuron, so that all three gathers take whole rows.

`gather` does without the predictors and gathers given neurons for every token: what it takes longer than core neurons
is the cost of changing neurons, what `predictor` takes longer than it is the predictors' latency.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from benchmarks.contenders.coreinfer import device_bytes
from benchmarks.contenders.trial import Report, Trial
from benchmarks.shapes import random_prompts, shape_config, shape_params
from coreinfer_jax.device import check_memory
from coreinfer_jax.engine.options import GREEDY
from coreinfer_jax.engine.programs import prefill
from coreinfer_jax.engine.sampling import make_sampling
from coreinfer_jax.model import unembed
from coreinfer_jax.model.backends import DECODE_OPTIONS
from coreinfer_jax.model.cache import KVCache, bucket, cache_bytes, init_cache
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.families import family_of
from coreinfer_jax.model.layers import attention, layer_norm, mlp_pass, rms_norm
from coreinfer_jax.model.weights import Linear, Mlp, Params, leaf_bytes, weight_bytes_per_step
from coreinfer_jax.sparsity.votes import kept_neurons

RANK = 1000


# What chooses a layer's neurons: a predictor, or the neurons themselves, int32 [K].
Chooser: TypeAlias = "Predictor | Array"


@struct.dataclass
class Predictor:
    """Scores of a layer's neurons, expand (compress x): compress [R, D], expand [F, R]."""

    compress: Linear
    expand: Linear


def run(trial: Trial) -> Report:
    """Load, generate once, then measure: the prompt with the full model, every token after the first predicted."""
    assert trial.keep is not None, "a predictor chooses some of the neurons"
    began = perf_counter()
    config = shape_config(trial.fields)
    params = jax.block_until_ready(shape_params(config, trial.dtype))
    kept = kept_neurons(trial.keep, config.mlp_size)
    predicting = trial.contender == "predictor"
    check_memory(_added_bytes(params, predicting), "predictors and down projections by neuron", "take fewer --layers")
    choosers = jax.block_until_ready(_predictors(params) if predicting else _given(config, kept))
    by_neuron = jax.block_until_ready(_by_neuron(params))
    loaded = perf_counter()
    runs = [_generate(params, by_neuron, choosers, kept, trial) for _ in range(trial.generations + 1)]
    # The unmeasured generation is the first.
    first_call, measured = runs[0][0] + runs[0][1], runs[1:]
    return Report(
        decode_seconds=[decoding for _, decoding, _ in measured],
        first_token_seconds=[first for first, _, _ in measured],
        made_tokens=[made for _, _, made in measured],
        load_seconds=loaded - began,
        first_call_seconds=first_call,
        bytes_per_token=bytes_per_token(params, choosers, kept, trial),
        predictor_bytes=_bytes(choosers) if predicting else None,
        prefill_seconds=[first for first, _, _ in measured],
        device_bytes=device_bytes(),
    )


def _generate(
    params: Params, by_neuron: Params, choosers: Sequence[Chooser], kept: int, trial: Trial
) -> tuple[float, float, int]:
    """Seconds to the first token, of all others, and how many there were."""
    began = perf_counter()
    config = params.config
    cache = init_cache(config, 1, bucket(trial.prompt_tokens + trial.new_tokens), jnp.dtype(trial.dtype))
    length = np.full(1, trial.prompt_tokens, np.int32)
    prompts = random_prompts(config, 1, trial.prompt_tokens)
    sampling = make_sampling(config, 1, GREEDY, trial.new_tokens)
    state, _, _ = prefill(
        params, prompts, length, np.zeros(1, np.int32), cache, [], sampling, None, observed=(), filled=prompts.shape[1]
    )
    jax.block_until_ready(state)
    first = perf_counter()
    tokens = jnp.full(trial.new_tokens, -1, jnp.int32).at[0].set(state.token[0])
    drawn = jax.block_until_ready(_decode(by_neuron, choosers, state.cache, tokens, jnp.asarray(length), kept))
    return first - began, perf_counter() - first, int((drawn >= 0).sum())


@partial(jax.jit, static_argnames="kept", donate_argnames="cache", compiler_options=DECODE_OPTIONS)
def _decode(
    params: Params, choosers: Sequence[Chooser], cache: KVCache, tokens: Array, position: Array, kept: int
) -> Array:
    """`tokens` [n], of which the first is there, with the others filled in."""

    def step(i: Array, state: tuple[KVCache, Array]) -> tuple[KVCache, Array]:
        cache, tokens = state
        cache, token = _step(params, choosers, cache, tokens[i][None], position + i, kept)
        return cache, tokens.at[i + 1].set(token[0])

    return lax.fori_loop(0, tokens.shape[0] - 1, step, (cache, tokens))[1]


def _step(
    params: Params, choosers: Sequence[Chooser], cache: KVCache, token: Array, position: Array, kept: int
) -> tuple[KVCache, Array]:
    """The cache after `token` [1] at `position` [1], and the next token."""
    config, positions = params.config, position[:, None]
    family = family_of(config)
    normed = rms_norm if params.layers[0].mlp_norm.bias is None else layer_norm
    x, contexts = family.embed(params, token[:, None], positions, cache.capacity)
    written = []
    pasts = zip(cache.keys, cache.values, strict=True)
    for layer, chooser, past, context in zip(params.layers, choosers, pasts, contexts, strict=True):
        attended, past = attention(
            normed(x, layer.attention_norm, config.norm_eps), layer.attention, past, positions, context, config
        )
        x = x + attended
        x = x + _narrow_mlp(normed(x, layer.mlp_norm, config.norm_eps), layer.mlp, chooser, kept, config)
        written.append(past)
    keys, values = zip(*written, strict=True)
    logits = unembed(params, family.finish(params, x))
    return KVCache(keys=keys, values=values), jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)


def _narrow_mlp(x: Array, mlp: Mlp, chooser: Chooser, kept: int, config: ModelConfig) -> Array:
    """The MLP's output for x [1, 1, D], by the `kept` neurons that are chosen for it."""
    chosen = chooser if isinstance(chooser, Array) else _best(x, chooser, kept)
    gate = None if mlp.gate is None else mlp.gate.take_outputs(chosen)
    seen = mlp_pass(x, replace(mlp, gate=gate, up=mlp.up.take_outputs(chosen)), config)
    by_neuron = jnp.take(mlp.down.weight, chosen, axis=0, mode="clip")
    return replace(mlp.down, weight=by_neuron.T)(seen.activations)


def _best(x: Array, predictor: Predictor, kept: int) -> Array:
    """Indices [K] of the `kept` neurons with the highest scores for x [1, 1, D]."""
    scores = predictor.expand(predictor.compress(x))
    return lax.top_k(scores[0, 0], kept)[1]


@jax.jit
def _predictors(params: Params) -> list[Predictor]:
    """Parts of the model's own random weights, repeated, as predictors of every layer."""

    def weight(size_out: int, size_in: int) -> Linear:
        return Linear(weight=jnp.resize(params.token_embedding, (size_out, size_in)))

    D, F = params.config.hidden_size, params.config.mlp_size
    return [Predictor(compress=weight(RANK, D), expand=weight(F, RANK)) for _ in params.layers]


def _given(config: ModelConfig, kept: int) -> list[Array]:
    """`kept` neurons of every layer, anywhere in it."""
    generator = np.random.default_rng(0)
    return [
        jnp.asarray(np.sort(generator.choice(config.mlp_size, kept, replace=False)).astype(np.int32))
        for _ in range(config.num_layers)
    ]


@jax.jit
def _down_by_neuron(down: list[Array]) -> list[Array]:
    return [weight.T for weight in down]


def _added_bytes(params: Params, predicting: bool) -> int:
    """Of down projections held a second time, and of the predictors."""
    config, item = params.config, params.dtype.itemsize
    per_layer = config.hidden_size * config.mlp_size
    per_layer += RANK * (config.hidden_size + config.mlp_size) if predicting else 0
    return config.num_layers * per_layer * item


def _by_neuron(params: Params) -> Params:
    """`params` whose down projections are stored [F, D]."""
    turned = _down_by_neuron([layer.mlp.down.weight for layer in params.layers])
    layers = tuple(
        replace(layer, mlp=replace(layer.mlp, down=replace(layer.mlp.down, weight=weight)))
        for layer, weight in zip(params.layers, turned, strict=True)
    )
    return replace(params, layers=layers)


def _bytes(choosers: Sequence[Chooser]) -> int:
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(choosers))


def bytes_per_token(params: Params, choosers: Sequence[Chooser], kept: int, trial: Trial) -> float:
    """Bytes a step needs: predictors, the chosen neurons, everything else of the model, and the cache."""
    config = params.config
    mlps = sum(leaf_bytes(leaf) for layer in params.layers for leaf in jax.tree.leaves(layer.mlp))
    capacity = bucket(trial.prompt_tokens + trial.new_tokens)
    cache = cache_bytes(config, 1, capacity, params.dtype)
    return weight_bytes_per_step(params, 1) - mlps + mlps * kept / config.mlp_size + _bytes(choosers) + cache
