"""Lossless decoding: the tokens of plain decoding with the full model, whatever is drafted and accepted."""

import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

import coreinfer_jax as ci
from coreinfer_jax.cli import main
from coreinfer_jax.cli.reply import Reply
from coreinfer_jax.engine import lossless
from coreinfer_jax.engine.drafting import BEST, CORE, LOOKUP, Trust, could_pay, look_up, no_experience, plan_next
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.loop import begin
from coreinfer_jax.engine.options import GREEDY
from coreinfer_jax.engine.rows import Rows
from coreinfer_jax.engine.sampling import make_sampling
from coreinfer_jax.engine.verification import (
    Drafted,
    Progress,
    decode_drafted,
    nothing_drafted,
    planned_next,
    read_drafts,
    spare_time,
)
from coreinfer_jax.model.backends import draft_size
from coreinfer_jax.model.cache import KVCache
from tests.support import LLAMA, MODELS, OPT, first_quick, half_slow, random_model
from tests.test_compilation import traced

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 101, n).tolist() for n in (23, 1, 40)]
# So few neurons that most drafts are wrong, and some are right.
FEW = ci.CoreConfig(beta=0.3)
DRAWN = {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "key": 5}
SIZE = 3


@cache
def dense(name: str, new: int, **options: object) -> ci.Generation:
    return ci.generate(random_model(MODELS[name]), PROMPTS, None, max_new_tokens=new, **options)


@pytest.mark.usefixtures("drafts_always")
@pytest.mark.parametrize(("name", "core"), first_quick(sorted(MODELS), [FEW]))
def test_greedy_batches_are_the_full_models(name: str, core: ci.CoreConfig) -> None:
    out = ci.generate(random_model(MODELS[name]), PROMPTS, core, max_new_tokens=30, lossless=True)
    np.testing.assert_array_equal(out.tokens, dense(name, 30).tokens)
    drafting = out.stats.drafting
    assert drafting is not None
    assert drafting.tokens == out.lengths.sum() - len(PROMPTS)
    assert drafting.single_passes + drafting.verifications == out.stats.decode_steps
    assert drafting.core_steps > 10
    for name in ("core", "lookup"):
        assert all(0 <= a <= r for a, r in zip(drafting.accepted[name], drafting.reached[name], strict=True))


@pytest.mark.usefixtures("drafts_always")
def test_a_single_row_drafts_more_and_penalties_count_within_a_draft() -> None:
    params = random_model(LLAMA)
    for options in ({}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}):
        out = ci.generate(params, PROMPTS[:1], None, max_new_tokens=40, lossless=True, **options)
        expected = ci.generate(params, PROMPTS[:1], None, max_new_tokens=40, **options)
        np.testing.assert_array_equal(out.tokens, expected.tokens)
        assert out.stats.drafting.verifications > 10
    assert draft_size(params.token_embedding, 1) == SIZE


@pytest.mark.usefixtures("drafts_always")
def test_drawn_tokens_are_those_of_the_same_key() -> None:
    params = random_model(LLAMA)
    out = ci.generate(params, PROMPTS, FEW, max_new_tokens=30, lossless=True, **DRAWN)
    np.testing.assert_array_equal(out.tokens, dense("llama", 30, **DRAWN).tokens)


@pytest.mark.usefixtures("drafts_always")
def test_a_stream_makes_the_same_tokens() -> None:
    params = random_model(LLAMA)
    chunks = list(ci.stream(params, PROMPTS, FEW, max_new_tokens=30, lossless=True))
    for b, expected in enumerate(dense("llama", 30).tokens):
        assert np.concatenate([chunk.tokens[b, : chunk.lengths[b]] for chunk in chunks]).tolist() == expected.tolist()
    assert len(chunks) > 3
    assert all((chunk.lengths <= chunk.tokens.shape[1]).all() for chunk in chunks)


def test_a_conversation_goes_on_with_the_full_models_replies() -> None:
    params, tokens, past = random_model(LLAMA), PROMPTS[0], None
    for _ in range(2):
        chunks = list(ci.converse(params, tokens, past, None, max_new_tokens=40, lossless=True))
        past = chunks[-1][1]
        made = [int(i) for chunk, _ in chunks for i in chunk.tokens[0, : chunk.lengths[0]]]
        assert made == ci.generate(params, [tokens], None, max_new_tokens=40).tokens[0].tolist()
        tokens = [*tokens, *made[:3], 7]


def begun(params: ci.Params, prompts: list[list[int]], core: object, new: int, **options: object) -> tuple:
    """A state before its second token, and narrowed weights."""
    request = make_request(params, prompts, core, {"max_new_tokens": new, "lossless": True} | options)
    start = begin(request)
    return nothing_drafted(start.rows, SIZE), start.chosen.weights(params)


def tokens_of(params: ci.Params, narrow: ci.Params | None, state: Drafted, forced: int) -> tuple[np.ndarray, Drafted]:
    """At most 64 more tokens of each row, where each pass drafts as `forced` says."""
    costs = jnp.asarray([1.0, 1.0], jnp.float32)
    state, made, _ = decode_drafted(params, narrow, state, np.int32(64), costs, np.int32(forced), size=SIZE)
    return np.array(made), state


@pytest.mark.parametrize("steps", first_quick([3, 1, 2]))
def test_a_drafter_that_is_always_wrong_costs_no_token(steps: int) -> None:
    params, other = random_model(LLAMA), random_model(LLAMA, seed=1)
    state, _ = begun(params, PROMPTS, None, 30)
    made, state = tokens_of(params, other, state, 1 + steps)
    np.testing.assert_array_equal(made[:, :29], dense("llama", 30).tokens[:, 1:])
    assert int(state.core_steps) == steps * int(state.verified)
    assert int(state.single) == 0


def test_the_full_model_as_its_own_drafter_is_always_right() -> None:
    params = random_model(LLAMA)
    state, _ = begun(params, PROMPTS, None, 30)
    made, state = tokens_of(params, params, state, 1 + SIZE)
    np.testing.assert_array_equal(made[:, :29], dense("llama", 30).tokens[:, 1:])
    reached, accepted = np.array(state.reached)[CORE], np.array(state.accepted)[CORE]
    assert reached[0] > 0
    np.testing.assert_array_equal(reached, accepted)


def test_16_bit_tokens_are_those_of_the_same_program_whatever_is_drafted() -> None:
    params, other = (random_model(LLAMA, seed=seed, dtype="bfloat16") for seed in (0, 1))
    runs = []
    for narrow in (params, other):
        state, _ = begun(params, PROMPTS, None, 30)
        made, state = tokens_of(params, narrow, state, 1 + SIZE)
        runs.append((made[:, :29], np.array(state.accepted)[CORE].sum()))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert runs[0][1] > 10 * runs[1][1]


@partial(jax.jit, static_argnames="size")
def one_pass(params: ci.Params, state: Drafted, drafts: jax.Array, size: int) -> Progress:
    """One verification of the given drafts, as if all rows had looked them up."""
    rows = len(drafts)
    plan, _ = planned_next(state, jnp.ones(2), jnp.int32(1), size)
    loop = Progress(state, jnp.zeros((rows, 64 + size), jnp.int32), jnp.zeros(rows, jnp.int32))
    return read_drafts(params, loop, plan._replace(looks_up=jnp.ones(rows, bool)), drafts, jnp.full(rows, size))


# Of each of the three rows, the first place with a wrong token; SIZE for none.
@pytest.mark.parametrize(
    ("name", "wrong"), half_slow(["llama", "opt"], [(0, 1, 2), (1, 3, 0), (3, 0, 1), (2, 2, 3), (3, 3, 3)])
)
def test_a_rejection_at_any_place_keeps_what_stands_before(name: str, wrong: tuple[int, ...]) -> None:
    params, expected = random_model(MODELS[name]), dense(name, 30).tokens
    state, _ = begun(params, PROMPTS, None, 30)
    drafts = expected[:, 1 : 1 + SIZE].copy()
    for row, place in zip(drafts, wrong, strict=True):
        row[place:] = (row[place:] + 1) % 101
    loop = one_pass(params, state, jnp.asarray(drafts), SIZE)
    assert loop.count.tolist() == [place + 1 for place in wrong]
    assert loop.state.rows.position.tolist() == [len(p) + c + 1 for p, c in zip(PROMPTS, wrong, strict=True)]
    for row, made, count in zip(expected, np.array(loop.made), wrong, strict=True):
        assert made[: count + 1].tolist() == row[1 : count + 2].tolist()
    assert np.array(loop.state.accepted)[LOOKUP].tolist() == [sum(w > i for w in wrong) for i in range(SIZE)]
    assert np.array(loop.state.reached)[LOOKUP].tolist() == [sum(w >= i for w in wrong) for i in range(SIZE)]
    # What was rejected has left nothing behind that later tokens see.
    later, _ = tokens_of(params, None, loop.state, 1)
    for row, made, count in zip(expected, later, wrong, strict=True):
        assert made[: 28 - count].tolist() == row[count + 2 :].tolist()


@pytest.mark.parametrize(("ends", "place"), half_slow(["eos", "budget"], [1, 2, 3, 4]))
def test_a_row_that_ends_within_a_draft_has_nothing_behind_it(ends: str, place: int) -> None:
    params, expected = random_model(LLAMA), dense("llama", 30).tokens
    end = expected[0, place]
    assert end not in expected[0, :place]
    state, _ = begun(params, PROMPTS, None, 30 if ends == "eos" else place + 1)
    if ends == "eos":
        sampling = state.rows.sampling
        state = state.replace(
            rows=state.rows.replace(sampling=sampling.replace(is_eos=sampling.is_eos.at[0, end].set(True)))
        )
    loop = one_pass(params, state, jnp.asarray(expected[:, 1 : 1 + SIZE]), SIZE)
    assert loop.count[0] == place
    assert bool(loop.state.rows.done[0])
    assert np.array(loop.made)[0, :place].tolist() == expected[0, 1 : place + 1].tolist()
    _, state = tokens_of(params, None, loop.state, 1)
    assert int(state.rows.length[0]) == place + 1


@pytest.mark.usefixtures("drafts_always")
def test_generations_end_where_the_full_models_do() -> None:
    params, free = random_model(LLAMA), dense("llama", 30)
    ends = tuple(int(row[i]) for row, i in zip(free.tokens, (5, 11, 20), strict=True))
    out = ci.generate(params, PROMPTS, FEW, max_new_tokens=30, eos_ids=ends, lossless=True)
    expected = ci.generate(params, PROMPTS, None, max_new_tokens=30, eos_ids=ends)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_array_equal(out.lengths, expected.lengths)
    for new in (1, 2, 3):
        short = ci.generate(params, PROMPTS, FEW, max_new_tokens=new, lossless=True)
        np.testing.assert_array_equal(short.tokens, free.tokens[:, :new])


SMALL = replace(LLAMA, vocab_size=7, eos_ids=())


@pytest.mark.slow
def test_drawn_tokens_have_the_full_models_distribution() -> None:
    """Three tokens, two of them drafted, as often as the full model's probabilities say: a chi-square test."""
    params, other = random_model(SMALL), random_model(SMALL, seed=1)
    rows, V, temperature = 64, SMALL.vocab_size, 1.5
    found, fates = np.zeros((V * V, V)), np.zeros(2)
    for key in range(40):
        state, _ = begun(params, [[3, 4]] * rows, None, 3, temperature=temperature, key=key)
        first = np.array(state.rows.token)
        made, state = tokens_of(params, other, state, 1 + 2)
        np.add.at(found, (first * V + made[:, 0], made[:, 1]), 1)
        fates += [np.array(counted)[CORE, 0] for counted in (state.reached, state.accepted)]
    assert 0.1 < fates[1] / fates[0] < 0.9  # drafts of both fates
    texts = [[3, 4, a, b, 0] for a in range(V) for b in range(V)]
    logits = np.asarray(ci.forward(params, texts)[:, 1:4], np.float64) / temperature
    chances = np.exp(logits - logits.max(axis=-1, keepdims=True))
    chances /= chances.sum(axis=-1, keepdims=True)
    a, b = np.divmod(np.arange(V * V), V)
    expected = (
        found.sum() * (chances[np.arange(V * V), 0, a] * chances[np.arange(V * V), 1, b])[:, None] * chances[:, 2]
    )
    # Rare triples are counted together: the statistic asks for some five of each.
    often = expected >= 5
    observed, foretold = ([*c[often], c[~often].sum()] for c in (found, expected))
    assert chisquare(observed, foretold).pvalue > 0.001


def looked_up(text: list[int], size: int) -> list[int] | None:
    """What followed the longest n-gram of 3 or 2 tokens that ends `text`, where it stood last before; by definition."""
    for n in (3, 2):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                follows = text[end:]
                return [follows[i % len(follows)] for i in range(size)]
    return None


def test_what_followed_before_is_found() -> None:
    texts = [RNG.integers(3, 3 + kinds, n).tolist() for kinds in (1, 2, 3, 9) for n in (1, 2, 3, 4, 7, 20, 60)]
    history = np.full((len(texts), 64), 3, np.int32)  # what stands behind a text is no part of it
    for row, text in zip(history, texts, strict=True):
        row[: len(text)] = text
    last = jnp.asarray([len(text) - 1 for text in texts])
    tokens, found = look_up(jnp.asarray(history), last, 5)
    for text, made, is_there in zip(texts, np.array(tokens), np.array(found), strict=True):
        expected = looked_up(text, 5)
        assert is_there == (expected is not None), text
        assert expected is None or made.tolist() == expected, text
    assert 5 < found.sum() < len(texts)


@pytest.mark.parametrize(
    ("chance", "found", "costs", "expected"),
    [
        ((0.9, 0.5), True, (1.2, 0.1), (True, 3, False)),  # cheap drafts that are good
        ((0.2, 0.9), True, (1.2, 0.5), (True, 0, True)),  # earlier words are better, and free
        ((0.2, 0.9), False, (1.2, 0.5), (False, 0, False)),  # but there are none
        ((0.9, 0.9), True, (5.0, 0.1), (False, 0, True)),  # verifying costs more than it brings
        ((0.6, 0.1), True, (1.0, 0.4), (True, 1, False)),  # 1.6 / 1.4, and not 1.96 / 1.8
    ],
)
def test_the_plan_is_what_makes_most_tokens_in_the_time(
    chance: tuple[float, float], found: bool, costs: tuple[float, float], expected: tuple[bool, int, bool]
) -> None:
    many = 1e6
    trust = Trust(jnp.full((1, 2), many), many * jnp.asarray([chance], jnp.float32))
    rows = jnp.asarray([found]), jnp.zeros(1, bool)
    plan = plan_next(trust, *rows, jnp.asarray(costs, jnp.float32), jnp.float32(10), jnp.int32(BEST), SIZE)
    assert (bool(plan.verifies), int(plan.core_steps), bool(plan.looks_up[0])) == expected


def test_a_plan_costs_no_more_than_may_be_lost() -> None:
    trust = Trust(jnp.full((1, 2), 1e6), jnp.full((1, 2), 1e6))
    rows, costs = (jnp.zeros(1, bool), jnp.zeros(1, bool)), jnp.asarray([1.25, 0.5], jnp.float32)
    for spare, expected in ((2.0, 3), (1.5, 2), (0.75, 1), (0.5, 0), (-1.0, 0)):
        plan = plan_next(trust, *rows, costs, jnp.float32(spare), jnp.int32(BEST), SIZE)
        assert (int(plan.core_steps), bool(plan.verifies)) == (expected, expected > 0)


@pytest.mark.parametrize(
    ("new", "costs", "looked_up"),
    [
        (40, (1.125, 0.25), False),
        (64, (1.25, 0.5), True),
        (64, (3.0, 2.0), True),
        (150, (1.5, 0.25), False),
    ],
)
def test_drafts_that_are_all_wrong_cost_at_most_a_share_of_the_time(
    new: int, costs: tuple[float, float], looked_up: bool
) -> None:
    """Counted pass by pass, with drafters that are trusted all the same."""
    trust = Trust(jnp.full((2, 2), 1e6), jnp.full((2, 2), 1e6))
    found, done = jnp.full(2, looked_up), jnp.zeros(2, bool)
    plan_of = jax.jit(plan_next, static_argnames="size")
    state, taken, passes = no_drafts([new] * 2), 0.0, {0: 0, 1: 0}
    for made in range(new - 1):
        rows = state.rows.replace(length=jnp.full(2, 1 + made, jnp.int32))
        state = state.replace(rows=rows)
        spare = spare_time(state, jnp.asarray(costs))
        foreseen = min(new - 1, made + 64)
        assert float(spare) == pytest.approx(0.03 * foreseen - (taken - made), abs=1e-3)
        plan = plan_of(trust, found, done, jnp.asarray(costs), spare, jnp.int32(BEST), size=SIZE)
        verifies, steps = int(plan.verifies), int(plan.core_steps)
        taken += costs[0] + steps * costs[1] if verifies else 1
        assert taken - (made + 1) <= 0.03 * foreseen + 1e-3
        passes[verifies] += 1
        state = state.replace(
            single=state.single + 1 - verifies,
            verified=state.verified + verifies,
            core_steps=state.core_steps + steps,
        )
    assert taken <= 1.03 * (new - 1) + 1e-3
    assert passes[0] > 0
    # What can be lost is used to try.
    least = costs[0] - 1 + (0 if looked_up else costs[1])
    assert (passes[1] > 0) == (least <= 0.03 * (new - 1))


def no_drafts(budgets: list[int]) -> Drafted:
    """A state of rows without a model; they end after so many tokens."""
    ints = jnp.zeros(len(budgets), jnp.int32)
    sampling = make_sampling(LLAMA, len(budgets), GREEDY, 1)
    rows = Rows(
        cache=KVCache((), ()),
        token=ints,
        position=ints,
        length=ints + 1,
        done=ints > 0,
        finite=ints == 0,
        sampling=sampling.replace(budget=jnp.asarray(budgets, jnp.int32)),
    )
    return nothing_drafted(rows, SIZE)


def test_the_row_with_fewest_tokens_says_what_is_lost() -> None:
    state = no_drafts([50, 100, 30])
    for single, verified, steps, lengths, done in (
        (4, 0, 0, (5, 5, 5), (0, 0, 0)),
        (4, 6, 3, (12, 40, 30), (0, 0, 1)),
        (4, 6, 3, (12, 40, 30), (1, 0, 1)),
        (0, 20, 60, (50, 61, 7), (1, 0, 1)),
    ):
        taken = single + 1.5 * verified + 0.25 * steps
        slowest, seen = math.inf, 0
        for length, budget, is_done in zip(lengths, (50, 100, 30), done, strict=True):
            slowest = slowest if is_done else min(slowest, length - 1)
            seen = max(seen, length - 1 if is_done else min(budget, length + 64) - 1)
        counted = state.replace(
            single=jnp.int32(single),
            verified=jnp.int32(verified),
            core_steps=jnp.int32(steps),
            rows=state.rows.replace(length=jnp.asarray(lengths), done=jnp.asarray(done, bool)),
        )
        found = float(spare_time(counted, jnp.asarray([1.5, 0.25])))
        assert found == pytest.approx(0.03 * seen - taken + slowest, abs=1e-4)
    over = state.replace(rows=state.rows.replace(done=jnp.ones(3, bool)))
    assert math.isinf(float(spare_time(over, jnp.asarray([1.5, 0.25]))))


def test_a_wrong_drafter_that_is_trusted_is_given_up() -> None:
    params, other = random_model(LLAMA), random_model(LLAMA, seed=1)
    state, _ = begun(params, PROMPTS, None, 30)
    sure = [jnp.full((len(PROMPTS), 2), 1e9) for _ in range(2)]
    costs = jnp.asarray([1.25, 0.25], jnp.float32)
    state = state.replace(trust=Trust(*sure))
    state, made, _ = decode_drafted(params, other, state, np.int32(64), costs, np.int32(BEST), size=SIZE)
    np.testing.assert_array_equal(np.array(made)[:, :29], dense("llama", 30).tokens[:, 1:])
    assert int(state.core_steps) > 0
    taken = int(state.single) + 1.25 * int(state.verified) + 0.25 * int(state.core_steps)
    assert taken <= 1.03 * 29


@pytest.mark.parametrize(
    ("verify", "step", "size", "expected"),
    [
        (1.15, 0.6, 3, True),  # 3.44 / 2.95
        (1.15, 0.8, 3, False),  # 3.44 / 3.55, 2.71 / 2.75, 1.9 / 1.95
        (1.0, 0.89, 1, True),  # 1.9 / 1.89
        (1.0, 0.92, 1, False),
        (1.0, 0.0, 15, True),
        (1.15, lossless.NEVER, 3, False),
    ],
)
def test_narrow_steps_that_read_too_much_cannot_pay(verify: float, step: float, size: int, expected: bool) -> None:
    assert could_pay(verify, step, size) == expected


def test_steps_that_cannot_pay_are_not_even_measured() -> None:
    out = ci.generate(random_model(LLAMA), PROMPTS, ci.CoreConfig(beta=0.98), max_new_tokens=64, lossless=True)
    found = out.stats.drafting
    assert (found.core_steps, found.core_step_milliseconds) == (0, None)
    assert found.single_milliseconds > 0
    assert found.verify_milliseconds > 0


def test_short_answers_measure_nothing_that_could_be_lost() -> None:
    out = ci.generate(random_model(LLAMA), PROMPTS, FEW, max_new_tokens=30, lossless=True)
    found = out.stats.drafting
    assert found.single_passes == 29
    assert (found.verifications, found.verify_milliseconds, found.core_step_milliseconds) == (0, None, None)


def test_a_measured_verification_costs_no_less_than_a_pass() -> None:
    assert np.asarray(lossless.Seconds(2.0, 1.0, 0.5).costs).tolist() == [1.0, 0.25]
    assert np.asarray(lossless.Seconds(2.0, 3.0).costs).tolist() == [1.5, np.float32(lossless.NEVER)]
    assert np.asarray(lossless.Seconds().costs).tolist() == [np.float32(lossless.NEVER)] * 2


def test_drafters_are_trusted_at_first() -> None:
    assert (np.asarray(no_experience(2).chance) > 0.8).all()


@pytest.mark.usefixtures("drafts_always")
def test_other_prompts_and_settings_trace_nothing() -> None:
    params = random_model(LLAMA)
    ci.generate(params, PROMPTS, FEW, max_new_tokens=30, lossless=True)
    with traced() as messages:
        ci.generate(params, [row[::-1] for row in PROMPTS], FEW, max_new_tokens=25, lossless=True, eos_ids=(4,))
    assert messages == []


def test_a_model_that_keeps_all_neurons_does_not_draft_for_itself() -> None:
    out = ci.generate(random_model(LLAMA), PROMPTS, ci.CoreConfig(beta=1.0), max_new_tokens=8, lossless=True)
    assert out.stats.drafting.core_steps == 0
    assert out.stats.drafting.core_step_milliseconds is None


def test_lossless_is_a_flag() -> None:
    with pytest.raises(ci.CoreInferError, match="lossless='yes': give True or False"):
        ci.generate(random_model(OPT), PROMPTS, lossless="yes")


def test_a_stop_string_anywhere_in_a_draft_ends_the_text_there(
    shallow: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lossless, "BEST", 1 + SIZE)  # every pass verifies a draft, whatever that costs
    model, text = str(shallow["opt"]), "Once upon a time"
    params, tokenizer = ci.load(model)
    prompt = tokenizer.encode(text)
    tokens = ci.generate(params, [prompt], None, max_new_tokens=24).tokens[0].tolist()
    full = tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]
    chunks = list(ci.stream(params, [prompt], ci.CoreConfig(beta=0.9), max_new_tokens=24, lossless=True))
    assert sum(chunks[-1].stats.drafting.accepted["core"]) > 6
    for start in range(len(full) - 3):
        stop = full[start : start + 3]
        reply, shown = Reply(tokenizer, prompt, [stop]), ""
        for chunk in chunks:
            shown += reply.add(chunk)
            if reply.stopped:
                break
        assert reply.stopped
        assert shown + reply.finish() == full[: full.index(stop)]
    options = ["--beta", "0.9", "--max-new-tokens", "24", "--temperature", "0", "--lossless"]
    stop = full[len(full) // 2 :][:3]
    assert main(["generate", text, "--model", model, *options, "--stop", stop]) == 0
    assert capsys.readouterr().out == f"{text}{full[: full.index(stop)]}\n"
