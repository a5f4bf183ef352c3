"""What is traced, and what the compiled decode loop holds besides the weights."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.engine.drafting import BEST
from coreinfer_jax.engine.options import GREEDY
from coreinfer_jax.engine.programs import decode, no_sums, prefill
from coreinfer_jax.engine.regathering import no_passes
from coreinfer_jax.engine.rows import Rows
from coreinfer_jax.engine.sampling import make_sampling
from coreinfer_jax.engine.verification import decode_drafted, nothing_drafted
from coreinfer_jax.model.cache import init_cache
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import leaf_bytes
from coreinfer_jax.sparsity.rules import RULES
from tests.support import LLAMA, MODELS, first_quick, one_quick_in, random_model

RNG = np.random.default_rng(0)


@contextmanager
def traced() -> Iterator[list[str]]:
    """The messages JAX logs while it traces or compiles anything at all in this process."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        with jax.log_compiles():
            yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def run(params: ci.Params, length: int, core: ci.CoreConfig | None = ci.CoreConfig(), **settings: object) -> None:
    settings = {"max_new_tokens": 20} | settings
    ci.generate(params, [RNG.integers(3, 101, length).tolist()], core, **settings)


def test_the_guard_sees_a_trace() -> None:
    with traced() as messages:
        jax.jit(lambda x: x * 3)(jnp.ones(7))
    assert any("tracing" in message for message in messages)


@pytest.mark.parametrize("name", first_quick(["llama", "opt"]))
def test_within_a_bucket_nothing_is_traced_again(name: str) -> None:
    params = random_model(MODELS[name])
    run(params, 10)
    run(params, 10, temperature=0.5, key=0)
    key = jax.random.key(9)  # JAX traces its own making of keys
    with traced() as messages:
        run(params, 10)
        run(params, 41, max_new_tokens=23, eos_ids=(4, 5))
        run(params, 2, ci.CoreConfig(rule=ci.rules.Contribution(prior_tokens=9)), max_new_tokens=60)
        run(params, 33, max_new_tokens=5, temperature=1.3, top_k=7, key=5)
        run(params, 20, temperature=0.9, top_p=0.4, top_k=3, key=key, eos_ids=(7,))
        list(ci.stream(params, [[5, 6, 7]], ci.CoreConfig(), max_new_tokens=17))
    assert messages == []


def test_greedy_and_sampled_decoding_are_two_programs_per_shape() -> None:
    params = random_model(LLAMA)
    before = decode._cache_size()
    for seed in range(3):
        run(params, 30, ci.CoreConfig(beta=0.61))
        run(params, 30, ci.CoreConfig(beta=0.61), temperature=0.3 + seed, key=seed)
    assert decode._cache_size() - before == 2


def test_a_new_prompt_reuses_the_program_of_its_kept_widths() -> None:
    params = random_model(LLAMA)
    before = decode._cache_size()
    for length in (5, 12, 50):
        run(params, length, ci.CoreConfig(beta=0.37), max_new_tokens=14)
    assert decode._cache_size() - before == 1


WIDE = replace(
    LLAMA, vocab_size=512, hidden_size=512, embed_size=512, mlp_size=1536, num_layers=4, num_heads=8, head_size=64
)


def prefilled(params: ci.Params, rows: int = 1, capacity: int = 64) -> Rows:
    sampling = make_sampling(params.config, rows, GREEDY, 50)
    tokens, lengths = np.ones((rows, 64), np.int32), np.full(rows, 9, np.int32)
    cache = init_cache(params.config, rows, capacity, params.dtype)
    start = np.zeros(rows, np.int32)
    return prefill(params, tokens, lengths, start, cache, [], sampling, None, observed=(), filled=tokens.shape[1])[0]


def prefill_temporaries(
    params: ci.Params, tokens: int, observed: tuple[int, ...], rule: str, capacity: int | None = None
) -> int:
    """Bytes a prefill of `tokens` tokens needs besides its arguments when `rule` sums up layers `observed`."""
    config = params.config
    observer = RULES[rule]().observer(np.ones((1, tokens), bool), config.mlp_size) if observed else None
    cache = init_cache(config, 1, capacity or tokens, jnp.dtype("float32"))
    prompt, one = np.ones((1, tokens), np.int32), np.ones(1, np.int32)
    sums = no_sums.eval_shape(observer, params.layers[0], prompt, layers=len(observed)) if observed else []
    arguments = params, prompt, tokens * one, 0 * one, cache, sums, make_sampling(config, 1, GREEDY, 50), observer
    lowered = prefill.lower(*arguments, observed=observed, filled=tokens)
    return int(lowered.compile().memory_analysis().temp_size_in_bytes)


@pytest.mark.parametrize(("name", "rule"), first_quick(["llama", "opt"], ["contribution", "votes"]))
def test_one_layer_is_summed_up_before_the_next(name: str, rule: str) -> None:
    """The compiler would else keep the activations of all layers to the end; a block of tokens is what each may add."""
    tokens, block, few, many = 512, 64, 2, 12
    config = replace(MODELS[name], mlp_size=2048, max_positions=tokens + 64)

    def added(layers: int) -> int:
        shapes = abstract_params(replace(config, num_layers=layers), jnp.dtype("float32"))
        plain, voting = (prefill_temporaries(shapes, tokens, own, rule) for own in ((), tuple(range(layers))))
        return voting - plain

    assert added(many) - added(few) < 1.1 * (many - few) * block * config.mlp_size * 4
    assert added(few) < 3 * tokens * config.mlp_size * 4


def test_a_prefill_does_not_score_what_the_cache_has_room_for() -> None:
    tokens, capacity = 256, 4096
    params = abstract_params(replace(MODELS["opt"], max_positions=capacity), jnp.dtype("float32"))
    small, large = (prefill_temporaries(params, tokens, (), "votes", size) for size in (tokens, capacity))
    assert large - small < params.config.num_heads * tokens * tokens * 4  # the scores of one layer


# Kept neurons, and rows: as many as share a weight in a form of their own.
SETS = {"dense": (None, 1), "four-rows": (None, 4), "one-set": (range(600), 1), "set-per-row": ([range(600)] * 3, 3)}


@pytest.mark.parametrize(("kind", "dtype"), one_quick_in(4, SETS, ["float32", "bfloat16"]))
def test_decode_loop_temporaries_stay_below_one_layer(kind: str, dtype: str) -> None:
    """XLA would hoist float32 copies of bfloat16 weights out of the loop, every layer's at once, and copy the cache in
    every step; at this capacity the cache is larger than a layer."""
    kept, rows = SETS[kind]
    params = random_model(WIDE, dtype=dtype)
    layer = sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(params.layers[0]))
    narrow = params if kept is None else ci.compact(params, ci.CoreNeurons([kept] * WIDE.num_layers))
    state = prefilled(params, rows=rows, capacity=8192)
    memory = decode.lower(narrow, state, np.int32(8)).compile().memory_analysis()
    assert 0 < memory.temp_size_in_bytes < layer


@pytest.mark.parametrize(("watches", "dtype"), first_quick([True, False], ["float32", "bfloat16"]))
def test_verifying_drafts_copies_neither_weights_nor_cache(watches: bool, dtype: str) -> None:
    """Not for what is read in turns, the full weights and the narrowed ones; nor what is kept of activations."""
    config = replace(WIDE, num_layers=2)
    params = random_model(config, dtype=dtype)
    layer = sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(params.layers[0]))
    narrow = ci.compact(params, ci.CoreNeurons([range(600)] * 2))
    rows = replace(prefilled(params, capacity=8192), history=jnp.zeros((1, 8192), jnp.int32))
    watched = no_passes(params, np.zeros(1, np.int32), places=1024, layers=(0, 1)) if watches else None
    state, costs = nothing_drafted(rows, 3, watched), jnp.ones(2)
    lowered = decode_drafted.lower(params, narrow, state, np.int32(8), costs, np.int32(BEST), size=3)
    assert 0 < lowered.compile().memory_analysis().temp_size_in_bytes < layer


def test_the_cache_is_donated() -> None:
    params = random_model(LLAMA)
    rows = prefilled(params)
    decode(params, rows, np.int32(3))
    assert rows.cache.keys[0].is_deleted()
