"""Long prompts are read piece by piece: the same results as in one pass, and memory that does not grow with them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.engine.options import GREEDY
from coreinfer_jax.engine.programs import no_sums, prefill, prefill_bytes
from coreinfer_jax.engine.sampling import make_sampling
from coreinfer_jax.model import extend, observe_nothing, unembed
from coreinfer_jax.model.cache import init_cache
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.sparsity.rules import RULES, Votes
from tests.support import LLAMA, MODELS, random_model

LONG = 1024
WINDOWED = replace(
    LLAMA,
    family="gemma2",
    activation="gelu_tanh",
    windows=(100, None, 700),
    score_cap=20.0,
    tied=True,
    norm_plus_one=True,
)
CASES: dict[str, ModelConfig] = {
    name: replace(config, max_positions=2 * LONG) for name, config in (MODELS | {"windowed": WINDOWED}).items()
}
ROWS = {"alone": [900], "some": [1000, 70, 513], "whole": [LONG]}


def read(config: ModelConfig, lengths: list[int], rule: str, start: int):
    """LONG tokens per row behind `start` others, by a prefill and in one pass: cache, sums and logits of each."""
    params, rng, B = random_model(config), np.random.default_rng(1), len(lengths)
    layers = tuple(range(config.num_layers))
    tokens = jnp.asarray(rng.integers(3, 101, (B, start + LONG), dtype=np.int32))
    none, past = np.zeros(B, np.int32), init_cache(config, B, 2 * LONG, params.dtype)
    if start:
        _, past, _ = extend(params, tokens[:, :start], past, none, observe_nothing)
    counted = np.arange(LONG)[None] < np.array(lengths)[:, None]
    observer = RULES[rule]().observer(counted, config.mlp_size)
    rest = tokens[:, start:]
    hidden, cache, sums = jax.jit(partial(extend, observe=observer))(params, rest, past, none + start)
    logits = unembed(params, hidden[np.arange(B), np.array(lengths) - 1][:, None])[:, 0]
    rows, *others = prefill(
        params,
        rest,
        np.array(lengths, np.int32),
        none + start,
        past,
        no_sums(observer, params.layers[0], rest, layers=len(layers)),
        make_sampling(config, B, GREEDY, 8),
        observer,
        observed=layers,
        filled=2 * LONG if start else LONG,
    )
    return (rows.cache, *others), (cache, list(sums), logits)


@pytest.mark.parametrize(
    ("name", "rule", "rows", "start"),
    [
        ("opt", "votes", "some", 0),
        ("llama", "contribution", "alone", 100),
        ("windowed", "contribution", "some", 0),
        pytest.param("windowed", "votes", "whole", 700, marks=pytest.mark.slow),
        pytest.param("opt-350m-style", "energy", "whole", 0, marks=pytest.mark.slow),
    ],
)
def test_pieces_equal_one_pass(name: str, rule: str, rows: str, start: int) -> None:
    lengths = ROWS[rows]
    (cache, sums, logits), (whole_cache, whole_sums, whole_logits) = read(CASES[name], lengths, rule, start)
    np.testing.assert_allclose(logits, whole_logits, rtol=1e-4, atol=1e-4)
    for own, whole in zip(jax.tree.leaves(sums), jax.tree.leaves(whole_sums), strict=True):
        np.testing.assert_allclose(own, whole, rtol=1e-3, atol=2e-3)
    for own, whole in zip(jax.tree.leaves(cache), jax.tree.leaves(whole_cache), strict=True):
        for row, length in enumerate(lengths):
            seen = slice(0, start + length)
            np.testing.assert_allclose(own[row, :, seen], whole[row, :, seen], rtol=1e-4, atol=1e-4)


def temporaries(config: ModelConfig, tokens: int, rows: int = 1) -> int:
    """Bytes that a prefill in bfloat16 needs besides its arguments."""
    dtype = jnp.dtype("bfloat16")
    cache = jax.eval_shape(partial(init_cache, config, rows, tokens, dtype))
    prompt, one = np.ones((rows, tokens), np.int32), np.ones(rows, np.int32)
    arguments = (
        abstract_params(config, dtype),
        prompt,
        one,
        one,
        cache,
        [],
        make_sampling(config, rows, GREEDY, 8),
        None,
    )
    return int(prefill.lower(*arguments, observed=(), filled=tokens).compile().memory_analysis().temp_size_in_bytes)


ROOMY = replace(LLAMA, hidden_size=256, embed_size=256, mlp_size=1024, head_size=64, max_positions=1 << 15)


def test_temporaries_do_not_grow_with_the_prompt() -> None:
    """Not by a float32 copy of a layer's cache; one pass would need [B, N, T, T] scores."""
    short, long = (temporaries(ROOMY, tokens) for tokens in (2048, 16384))
    assert long - short < 16384 * ROOMY.num_kv_heads * ROOMY.head_size * 4


@pytest.mark.parametrize(("tokens", "rows"), [(512, 1), (2048, 1), (512, 8)])
def test_the_bytes_foreseen_are_about_those_of_the_program(tokens: int, rows: int) -> None:
    foreseen = prefill_bytes(ROOMY, (rows, tokens), tokens, None)
    assert foreseen <= temporaries(ROOMY, tokens, rows) < 2 * foreseen


def test_a_mean_budget_is_counted_as_one_pass() -> None:
    """Its voices follow from all tokens of a prompt, so that they are read at once."""
    counted = np.ones((1, 4096), bool)
    by_budget = [Votes(budget=budget).observer(counted, ROOMY.mlp_size) for budget in ("per_token", "mean")]
    pieces, whole = (prefill_bytes(ROOMY, counted.shape, 4096, observer) for observer in by_budget)
    assert whole == 2 * 4 * ROOMY.num_heads * 4096 * 4096 == 64 * pieces


def test_a_long_prompt_compiles_once_for_its_bucket() -> None:
    params = random_model(CASES["llama"])
    before = prefill._cache_size()
    for length in (700, 513, 1000):
        ci.generate(params, [[5] * length], None, max_new_tokens=20)
    assert prefill._cache_size() - before == 1
