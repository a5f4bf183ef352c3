"""Scores of continuations, against decoding token by token on narrowed weights."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.engine.programs import BLOCK, score_given
from coreinfer_jax.model import extend, observe_nothing, unembed
from coreinfer_jax.model.cache import init_cache
from tests.support import LLAMA, MODELS, OPT, random_model
from tests.test_evaluation import log_softmax

# Rows of unequal length; the longest continuation spans more than one block of logits.
LENGTHS = ((9, 5), (30, 1), (4, BLOCK + 3))
CASES = [
    ("opt", ci.CoreConfig(beta=0.3, layers=(0.3, 1.0), count_bos=False)),
    ("llama", None),
    ("llama", ci.CoreConfig(beta=0.4)),
    *(pytest.param(name, ci.CoreConfig(beta=0.4), marks=pytest.mark.slow) for name in MODELS if name != "llama"),
]


def texts(seed=3):
    generator = np.random.default_rng(seed)
    rows = [generator.integers(3, OPT.vocab_size, sum(lengths)).tolist() for lengths in LENGTHS]
    cut = [(row[:context], row[context:]) for row, (context, _) in zip(rows, LENGTHS, strict=True)]
    return [context for context, _ in cut], [continuation for _, continuation in cut]


@jax.jit
def run_tokens(params, tokens, cache, start):
    hidden, cache, _ = extend(params, tokens, cache, start, observe_nothing)
    return unembed(params, hidden)[0, -1], cache


def step_by_step(params, core, context, continuation):
    """Log-probabilities [n, V]: the full model over the context, then one narrowed step per token."""
    cache = init_cache(params.config, 1, 128, jnp.dtype("float32"))
    first, cache = run_tokens(params, jnp.asarray([context]), cache, jnp.zeros(1, jnp.int32))
    narrowed = params
    if core is not None:
        narrowed = ci.compact(params, ci.generate(params, [context], core, max_new_tokens=1).core)
    logits = [first]
    for t, token in enumerate(continuation[:-1], start=len(context)):
        step, cache = run_tokens(narrowed, jnp.asarray([[token]]), cache, jnp.full(1, t, jnp.int32))
        logits.append(step)
    return log_softmax(np.asarray(logits, np.float64))


@pytest.mark.parametrize(("model", "core"), CASES)
def test_one_pass_equals_steps_of_one_token(model, core):
    params = random_model(MODELS[model])
    contexts, continuations = texts()
    scores = ci.score_continuations(params, contexts, continuations, core)
    for b, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        expected = step_by_step(params, core, context, continuation)
        own = expected[np.arange(len(continuation)), continuation]
        np.testing.assert_allclose(scores.logprobs[b], own, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(scores.is_best[b], expected.argmax(axis=-1) == continuation)
        assert scores.logprobs[b].dtype == np.float32


def test_what_generate_makes_is_the_most_probable_continuation():
    params = random_model(LLAMA)
    contexts, _ = texts()
    core = ci.CoreConfig(beta=0.4)
    out = ci.generate(params, contexts, core, max_new_tokens=20)
    scores = ci.score_continuations(params, contexts, out.tokens, core)
    assert np.stack(scores.is_best).all()
    assert scores.core == out.core


def test_given_core_neurons_are_used():
    params = random_model(OPT)
    contexts, continuations = texts()
    core = ci.generate(params, contexts, ci.CoreConfig(beta=0.4), max_new_tokens=1).core
    chosen, given = (
        ci.score_continuations(params, contexts, continuations, one) for one in (ci.CoreConfig(beta=0.4), core)
    )
    for own, other in zip(chosen.logprobs, given.logprobs, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-6)  # two programs, which a GPU sums in different orders


def test_rows_of_a_batch_are_those_of_single_calls():
    params = random_model(LLAMA)
    contexts, continuations = texts()
    core = ci.CoreConfig(beta=0.4)
    together = ci.score_continuations(params, contexts, continuations, core)
    for b, row in enumerate(zip(contexts, continuations, strict=True)):
        alone = ci.score_continuations(params, row[:1], row[1:], core)
        np.testing.assert_allclose(together.logprobs[b], alone.logprobs[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(together.is_best[b], alone.is_best[0])


def test_every_position_of_the_model_can_be_read():
    params = random_model(replace(OPT, max_positions=20))
    row = texts()[1][2][:21]
    for context in (1, 12, 20):
        scores = ci.score_continuations(params, [row[:context]], [row[context:]], ci.CoreConfig(beta=0.4))
        # generate has no room after 20 tokens; what remains then is the full model's.
        core = None if context == 20 else ci.CoreConfig(beta=0.4)
        expected = step_by_step(params, core, row[:context], row[context:])
        own = expected[np.arange(21 - context), row[context:]]
        np.testing.assert_allclose(scores.logprobs[0], own, rtol=1e-4, atol=1e-4)


def test_other_texts_of_the_same_buckets_reuse_the_program():
    params = random_model(LLAMA)
    before = score_given._cache_size()
    for context, continuation in ((5, 3), (40, 8), (33, 5)):
        rows = np.full((2, context), 7), np.full((2, continuation), 9)
        ci.score_continuations(params, *rows, ci.CoreConfig(beta=0.23))
    assert score_given._cache_size() - before == 1


@pytest.mark.parametrize(
    ("contexts", "continuations", "said"),
    [
        ([[5]], [[]], "continuations: tokens: row 0 is empty"),
        ([[]], [[5]], "contexts: tokens: row 0 is empty"),
        ([[5], [6]], [[7]], "2 contexts and 1 continuations"),
        ([[5]], [[101]], "continuations: tokens: row 0 holds id 101"),
        ([[5], [5] * 100], [[7], [7] * 62], "row 1: 100 tokens of context and 62 of the continuation exceed"),
    ],
)
def test_mistakes_are_refused(contexts, continuations, said):
    with pytest.raises(ci.CoreInferError, match=said):
        ci.score_continuations(random_model(OPT), contexts, continuations)


def test_logits_that_are_nan_are_refused():
    params = random_model(OPT)
    broken = replace(params, token_embedding=params.token_embedding.at[9].set(jnp.nan))
    with pytest.raises(ci.CoreInferError, match="NaN or infinite"):
        ci.score_continuations(broken, [[5, 6]], [[9, 9, 7]])
