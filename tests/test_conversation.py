"""A conversation over one KV cache says what a fresh start over all of its tokens says, and reads less."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import coreinfer_jax as ci
from tests.support import MODELS, check_same_core, one_quick_in, random_model

CORES = {
    "stability": ci.CoreConfig(),
    "votes": ci.CoreConfig.paper(),
    "without-bos": ci.CoreConfig(count_bos=False, layers=(0.3, 1.0)),
    "mean": replace(ci.CoreConfig.paper(), rule=ci.rules.Votes(budget="mean")),
    "given": ci.CoreNeurons([range(5, 60)] * 3),
    "dense": None,
}
# Turn by turn what the user says; the last turn needs a larger cache than the first.
TURNS = [[2, *range(10, 30)], list(range(40, 47)), list(range(50, 70))]


def answer(params: ci.Params, tokens: list[int], past: ci.Conversation | None, core: object, **settings: object):
    """The reply's tokens, the last chunk, and the conversation after it."""
    chunks = list(ci.converse(params, tokens, past, core, max_new_tokens=15, **settings))
    last, conversation = chunks[-1]
    return np.concatenate([chunk.tokens[0] for chunk, _ in chunks]).tolist(), last, conversation


@pytest.mark.parametrize(("name", "core"), one_quick_in(3, ["opt", "llama"], CORES))
def test_every_turn_equals_a_fresh_start(name: str, core: str) -> None:
    params, chooser = random_model(MODELS[name]), CORES[core]
    tokens: list[int] = []
    past = None
    for turn in TURNS:
        tokens += turn
        reply, last, past = answer(params, tokens, past, chooser)
        fresh = ci.generate(params, [tokens], chooser, max_new_tokens=15)
        assert reply == fresh.tokens[0].tolist()
        assert (last.core is None) == (chooser is None)
        if chooser is not None:
            check_same_core(last.core, fresh.core)
        assert last.stats.prompt_tokens == (len(tokens),)
        tokens += reply


def test_only_what_is_new_is_read() -> None:
    params = random_model(MODELS["opt"])
    reply, last, past = answer(params, TURNS[0], None, ci.CoreConfig())
    assert last.stats.cached_tokens == (0,)
    _, last, _ = answer(params, [*TURNS[0], *reply, 7], past, ci.CoreConfig())
    assert last.stats.cached_tokens == (len(TURNS[0]),)


def test_sampled_turns_equal_a_fresh_start() -> None:
    params = random_model(MODELS["llama"])
    reply, _, past = answer(params, TURNS[0], None, ci.CoreConfig(), temperature=0.8, key=3)
    tokens = [*TURNS[0], *reply, 9]
    reply, _, _ = answer(params, tokens, past, ci.CoreConfig(), temperature=0.8, key=4)
    fresh = ci.generate(params, [tokens], ci.CoreConfig(), max_new_tokens=15, temperature=0.8, key=4)
    assert reply == fresh.tokens[0].tolist()


CHANGES = {
    "another-text": ([2, 5, 5, 5, 5], ci.CoreConfig()),
    "nothing-new": (TURNS[0], ci.CoreConfig()),
    "shorter": (TURNS[0][:5], ci.CoreConfig()),
    "another-ratio": ([*TURNS[0], 9], ci.CoreConfig(beta=0.7)),
    "mean": ([*TURNS[0], 9], replace(ci.CoreConfig.paper(), rule=ci.rules.Votes(budget="mean"))),
}


@pytest.mark.parametrize(("tokens", "core"), CHANGES.values(), ids=CHANGES.keys())
def test_what_does_not_go_on_is_read_from_the_start(tokens: list[int], core: ci.CoreConfig) -> None:
    params = random_model(MODELS["opt"])
    first = core if core.ranking.name == "votes" else ci.CoreConfig()
    _, _, past = answer(params, TURNS[0], None, first)
    reply, last, _ = answer(params, tokens, past, core)
    assert last.stats.cached_tokens == (0,)
    assert reply == ci.generate(params, [tokens], core, max_new_tokens=15).tokens[0].tolist()


def test_a_reply_broken_off_can_be_continued_from() -> None:
    params = random_model(MODELS["opt"])
    broken = list(itertools.islice(ci.converse(params, TURNS[0], None, ci.CoreConfig(), max_new_tokens=60), 2))
    said = np.concatenate([chunk.tokens[0] for chunk, _ in broken]).tolist()
    assert len(said) == 9
    tokens = [*TURNS[0], *said, 8]
    reply, last, _ = answer(params, tokens, broken[-1][1], ci.CoreConfig())
    assert last.stats.cached_tokens == (len(TURNS[0]),)
    assert reply == ci.generate(params, [tokens], ci.CoreConfig(), max_new_tokens=15).tokens[0].tolist()


def test_mistakes_leave_the_conversation_alive() -> None:
    params = random_model(MODELS["opt"])
    _, _, past = answer(params, TURNS[0], None, ci.CoreConfig())
    with pytest.raises(ci.CoreInferError, match="exceed the model's 160 positions"):
        ci.converse(params, [*TURNS[0], 9], past, max_new_tokens=150)
    with pytest.raises(ci.CoreInferError, match="outside the vocabulary"):
        ci.converse(params, [*TURNS[0], 900], past)
    _, last, _ = answer(params, [*TURNS[0], 9], past, ci.CoreConfig())
    assert last.stats.cached_tokens == (len(TURNS[0]),)


def test_a_turn_whose_memory_another_turn_took_is_refused() -> None:
    params = random_model(MODELS["opt"])
    turn = ci.converse(params, TURNS[0], max_new_tokens=100)
    _, middle = next(turn)
    list(ci.converse(params, [*TURNS[0], 5, 6], middle, max_new_tokens=4))
    with pytest.raises(ci.CoreInferError, match="another turn has gone on from it"):
        list(turn)
