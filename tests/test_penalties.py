"""Penalties of what repeats, and min-p, against transformers' own logits processors."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.engine.options import drawing_of
from coreinfer_jax.engine.penalties import penalised
from coreinfer_jax.engine.programs import decode
from coreinfer_jax.engine.sampling import draw, make_sampling
from tests.support import LLAMA, MODELS, OPT, first_quick, half_slow, random_model
from tests.test_compilation import traced

RNG = np.random.default_rng(0)
# Texts of few different tokens, so that n-grams repeat. Their lengths differ: rows of a batch are ragged.
TEXTS = [RNG.integers(3, 3 + kinds, length).tolist() for kinds, length in ((3, 30), (2, 7), (5, 50), (1, 1), (1, 12))]
PENALTIES = [(1.0, 0), (1.3, 0), (0.7, 0), (1.0, 1), (1.0, 2), (1.0, 3), (1.2, 4), (1.1, 1000)]


def processed(text: list[int], logits: np.ndarray, penalty: float, size: int) -> np.ndarray:
    """Logits float32 [V] of what follows `text`, as transformers changes them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids, scores = torch.tensor([text]), torch.tensor(logits)[None, :]
    if penalty != 1:
        scores = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    if size:
        scores = transformers.NoRepeatNGramLogitsProcessor(size)(ids, scores)
    return scores[0].numpy()


@pytest.mark.torch
@pytest.mark.parametrize(("penalty", "size"), PENALTIES)
def test_logits_are_lowered_as_transformers_does(penalty: float, size: int) -> None:
    logits = (RNG.standard_normal((len(TEXTS), OPT.vocab_size)) * 3).astype(np.float32)
    drawing = drawing_of({"repetition_penalty": penalty, "no_repeat_ngram_size": size}, OPT)
    history = np.zeros((len(TEXTS), 64), np.int32)
    for row, text in zip(history, TEXTS, strict=True):
        row[: len(text)] = text
    lengths = jnp.asarray([len(text) for text in TEXTS], jnp.int32)
    lowered = penalised(jnp.asarray(logits), make_sampling(OPT, len(TEXTS), drawing, 9), jnp.asarray(history), lengths)
    expected = [processed(text, row, penalty, size) for text, row in zip(TEXTS, logits, strict=True)]
    np.testing.assert_allclose(lowered, expected, rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize(("name", "asked"), half_slow(["llama", "opt"], [(1.3, 3), (1.8, None), (None, 2)]))
def test_generate_equals_a_loop_with_transformers_processors(name: str, asked: tuple[float | None, int | None]) -> None:
    penalty, size = asked
    params = random_model(MODELS[name])
    asked = {"repetition_penalty": penalty, "no_repeat_ngram_size": size}
    made = ci.generate(params, TEXTS[:3], None, max_new_tokens=40, **asked).tokens.tolist()
    for text, new in zip(TEXTS, made[:2], strict=False):
        expected = list(text)
        for _ in range(40):
            # Attention is causal: what fills the row up to one length, for one program, changes nothing before it.
            row = [*expected, *[0] * (100 - len(expected))]
            logits = np.asarray(ci.forward(params, [row])[0, len(expected) - 1])
            expected.append(int(processed(expected, logits, penalty or 1.0, size or 0).argmax()))
        assert new == expected[len(text) :]
    assert made != ci.generate(params, TEXTS[:3], None, max_new_tokens=40).tokens.tolist()


def test_no_ngram_stands_twice() -> None:
    """By the definition, over more tokens than one dispatch makes, streamed in small chunks."""
    params, prompt = random_model(LLAMA), TEXTS[3]
    chunks = ci.stream(params, [prompt], max_new_tokens=120, no_repeat_ngram_size=2)
    text = prompt + [int(i) for chunk in chunks for i in chunk.tokens[0]]
    pairs = list(itertools.pairwise(text))
    assert len(set(pairs)) == len(pairs) == 120


def test_a_vocabulary_that_is_used_up_may_repeat() -> None:
    """Every token stands in the text, so that none could follow; the most probable one does."""
    every = jnp.arange(OPT.vocab_size, dtype=jnp.int32)[None, :]
    logits = jnp.asarray(RNG.standard_normal((1, OPT.vocab_size)), jnp.float32)
    sampling = make_sampling(OPT, 1, drawing_of({"no_repeat_ngram_size": 1}, OPT), 9)
    assert (penalised(logits, sampling, every, jnp.asarray([OPT.vocab_size])) == logits).all()


@pytest.mark.parametrize("options", first_quick([{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}]))
def test_a_conversation_looks_at_all_that_was_said(options: dict[str, float]) -> None:
    params, tokens = random_model(MODELS["opt"]), [2, *range(10, 30)]
    past = None
    for _ in range(3):
        chunks = list(ci.converse(params, tokens, past, max_new_tokens=9, **options))
        past = chunks[-1][1]
        expected = ci.generate(params, [tokens], max_new_tokens=9, **options).tokens[0].tolist()
        assert [int(i) for chunk, _ in chunks for i in chunk.tokens[0]] == expected
        tokens = [*tokens, *expected, 5]


def test_turns_that_penalise_go_on_from_what_was_read() -> None:
    params, tokens = random_model(MODELS["opt"]), [2, *range(10, 30)]
    *_, (_, past) = ci.converse(params, tokens, max_new_tokens=9)  # nothing is penalised yet
    longer = [*tokens, *range(12, 40)]
    chunks = [chunk for chunk, _ in ci.converse(params, longer, past, max_new_tokens=20, repetition_penalty=2.0)]
    assert chunks[-1].stats.cached_tokens == (len(tokens),)
    expected = ci.generate(params, [longer], max_new_tokens=20, repetition_penalty=2.0)
    assert np.concatenate([chunk.tokens[0] for chunk in chunks]).tolist() == expected.tokens[0].tolist()


def test_settings_and_texts_of_one_shape_share_a_program() -> None:
    params = random_model(LLAMA)
    ci.generate(params, [TEXTS[0]], None, max_new_tokens=20, repetition_penalty=1.3)
    programs = decode._cache_size()
    with traced() as messages:
        ci.generate(params, [TEXTS[1]], None, max_new_tokens=30, no_repeat_ngram_size=3)
        ci.generate(params, [TEXTS[2]], None, max_new_tokens=9, repetition_penalty=0.9, no_repeat_ngram_size=5)
    assert (messages, decode._cache_size()) == ([], programs)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, None, None, 0.1), (0.7, None, None, 0.3), (1.5, 9, None, 0.2), (1.0, None, 0.6, 0.05), (1.0, 40, 0.9, 1.0)],
)
def test_min_p_keeps_what_transformers_keeps(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float
) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    logits = (RNG.standard_normal(OPT.vocab_size) * 2).astype(np.float32)
    scores = torch.tensor(logits)[None, :] / temperature
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    expected = torch.softmax(transformers.MinPLogitsWarper(min_p)(None, scores), dim=-1)[0].numpy()
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "key": 0}
    sampling = make_sampling(OPT, 20_000, drawing_of(options, OPT), 9)
    drawn = draw(
        jnp.broadcast_to(jnp.asarray(logits), (20_000, OPT.vocab_size)), sampling, jnp.zeros(20_000, jnp.int32)
    )
    counts = np.bincount(np.asarray(drawn), minlength=OPT.vocab_size)
    # Each count is binomial; five standard deviations over at most 101 tokens.
    assert (np.abs(counts - 20_000 * expected) <= 5 * np.sqrt(20_000 * expected * (1 - expected)) + 1e-6).all()


def test_neutral_penalties_are_the_program_without_any() -> None:
    params = random_model(LLAMA)
    ci.generate(params, [TEXTS[0]], None, max_new_tokens=20)
    with traced() as messages:
        ci.generate(params, [TEXTS[0]], None, max_new_tokens=20, repetition_penalty=1, no_repeat_ngram_size=0)
    assert messages == []
