"""Core neurons that follow a text in lossless decoding: what is seen of it, when they are gathered, what it costs."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.cli.reply import facts
from coreinfer_jax.engine import lossless
from coreinfer_jax.engine.drafting import CORE, LOOK_EVERY, LOOKUP, Trust
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.lossless import Seconds
from coreinfer_jax.engine.regathering import Regathering, no_passes
from coreinfer_jax.engine.verification import Drafted, spare_time, watched_places
from coreinfer_jax.sparsity.choice import Chosen
from tests.support import LLAMA, MODELS, check_same_core, random_model, with_mlps_on_host
from tests.test_compilation import traced
from tests.test_generate import empty_cache, run_all
from tests.test_linear import explained
from tests.test_lossless import DRAWN, FEW, PROMPTS, no_drafts
from tests.test_mesh import ROWS, over, wide

NEW = 88
SHARED_VOTES = replace(ci.CoreConfig.paper(), beta=0.3, per_row=False)
# What no look and no gather takes long beside.
SLOW = Seconds(single=1000.0, verify=1000.0, step=1.0)


@pytest.fixture(autouse=True)
def drafts_with_time_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass verifies one token that core neurons drafted, and there is time to gather."""
    monkeypatch.setattr(lossless, "BEST", 2)
    monkeypatch.setattr(lossless, "_measured", lambda run: (run, SLOW))


@contextmanager
def followed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Any]]]:
    """What each kind of step makes of a `Regathering`, in order."""
    made: dict[str, list[Any]] = {"summed_up": [], "looked": [], "gathered": []}

    def spied(name: str) -> Any:
        original = getattr(Regathering, name)

        def step(*arguments: Any) -> Any:
            made[name].append(result := original(*arguments))
            return result

        return step

    with monkeypatch.context() as patched:
        for name in made:
            patched.setattr(Regathering, name, spied(name))
        yield made


def lossless_and_dense(core: object, name: str = "llama", **options: Any) -> tuple[ci.Generation, list[list[int]]]:
    """A lossless generation of the prompts, and whole texts of the full model alone, which it must have made."""
    params = random_model(MODELS[name])
    regather_at = options.pop("regather_at", None)
    full = ci.generate(params, PROMPTS, None, max_new_tokens=NEW, **options)
    out = ci.generate(params, PROMPTS, core, max_new_tokens=NEW, lossless=True, regather_at=regather_at, **options)
    np.testing.assert_array_equal(out.tokens, full.tokens)
    return out, [prompt + row.tolist() for prompt, row in zip(PROMPTS, full.tokens, strict=True)]


def beginnings(texts: list[list[int]], lengths: np.ndarray) -> list[list[int]]:
    return [text[:length] for text, length in zip(texts, lengths, strict=True)]


def sums_of(params: ci.Params, texts: list[list[int]]) -> list[list[dict[str, np.ndarray]]]:
    """By layer and row what the rule `contribution` sums up of texts, by NumPy from one dense pass."""
    padded = np.zeros((len(texts), params.config.max_positions), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    start = jnp.zeros(len(texts), jnp.int32)
    _, _, seen = run_all(params, jnp.asarray(padded), empty_cache(params, len(texts)), start)
    return [
        [
            _contributions(np.asarray(row, np.float64)[: len(text)], layer)
            for row, text in zip(of_layer, texts, strict=True)
        ]
        for of_layer, layer in zip(seen, params.layers, strict=True)
    ]


def _contributions(a: np.ndarray, layer: Any) -> dict[str, np.ndarray]:
    norms = np.linalg.norm(np.asarray(layer.mlp.down.weight, np.float64), axis=0)
    weights = 1 / ((a * norms) ** 2).sum(axis=1)
    return {"tokens": np.array(len(a)), "weight": weights.sum(), "total": weights @ a, "squares": weights @ a**2}


def test_sums_are_those_of_one_pass_over_all_that_was_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    with followed(monkeypatch) as made:
        out, texts = lossless_and_dense(FEW, regather_at=1.0)
    assert sum(out.stats.drafting.accepted["core"]) > 0
    assert sum(out.stats.drafting.reached["core"]) > sum(out.stats.drafting.accepted["core"])
    known = made["summed_up"][-1]
    assert (known.summed >= [len(prompt) + LOOK_EVERY for prompt in PROMPTS]).all()
    expected = sums_of(random_model(LLAMA), beginnings(texts, known.summed))
    for own, of_layer in zip(known.sums, expected, strict=True):
        for b, row in enumerate(of_layer):
            for name, value in row.items():
                np.testing.assert_allclose(own[name][b], value, rtol=1e-4, atol=1e-4 * np.abs(value).max())


def test_a_text_that_may_drift_as_far_as_it_likes_keeps_its_prompts_neurons(monkeypatch: pytest.MonkeyPatch) -> None:
    params = random_model(LLAMA)
    with followed(monkeypatch) as made:
        out, texts = lossless_and_dense(FEW, regather_at=1.0)
    at_first = ci.generate(params, PROMPTS, FEW, max_new_tokens=1).core
    check_same_core(out.core, at_first)
    known, _ = made["looked"][-1]
    later = ci.generate(params, beginnings(texts, known.summed), FEW, max_new_tokens=1).core
    gone = [
        len(set(old) - set(new)) / len(old)
        for of_layer in zip(at_first.layers, later.layers, strict=True)
        for old, new in zip(*(own.tolist() for own in of_layer), strict=True)
    ]
    assert out.stats.drafting.drift == pytest.approx(np.mean(gone))
    assert 0 < out.stats.drafting.drift < 1
    assert out.stats.drafting.regathered == 0


@pytest.mark.parametrize(
    ("name", "core", "options"),
    [
        ("llama", FEW, {}),
        pytest.param("llama", SHARED_VOTES, {}, marks=pytest.mark.slow),
        pytest.param("opt", FEW, DRAWN, marks=pytest.mark.slow),
    ],
    ids=["llama", "llama-shared-votes", "opt-drawn"],
)
def test_a_text_that_drifted_has_the_neurons_chosen_of_all_of_it(
    name: str, core: ci.CoreConfig, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with followed(monkeypatch) as made:
        out, texts = lossless_and_dense(core, name, regather_at=0.0, **options)
    drafting = out.stats.drafting
    assert drafting.regathered == len(made["gathered"]) > 0
    known, narrow = made["gathered"][-1]
    whole = ci.generate(random_model(MODELS[name]), beginnings(texts, known.summed), core, max_new_tokens=1).core
    check_same_core(out.core, whole)
    for layer, kept, own in zip(random_model(MODELS[name]).layers, narrow.layers, whole.layers, strict=True):
        expected = np.asarray(layer.mlp.up.weight)[own]
        np.testing.assert_array_equal(kept.mlp.up.weight[..., : own.shape[-1], :], expected)
    assert drafting.regathering_milliseconds > 0
    assert re.search(r"; core neurons gathered anew (once|2 times), drift \d+% at", facts(out.stats, NEW))


def test_gathering_anew_traces_nothing() -> None:
    params = random_model(LLAMA)
    lossless_and_dense(FEW, regather_at=0.0)
    with traced() as messages:
        turned = [row[::-1] for row in PROMPTS]
        out = ci.generate(params, turned, FEW, max_new_tokens=NEW - 3, lossless=True, regather_at=0.01)
    assert out.stats.drafting.regathered > 0
    assert messages == []


@pytest.mark.slow
def test_devices_follow_a_text_together() -> None:
    asked: dict[str, Any] = {"max_new_tokens": NEW, "lossless": True, "regather_at": 0.0}
    one = ci.generate(wide("llama"), ROWS, ci.CoreConfig(beta=0.3, shards=4), **asked)
    many = ci.generate(over("llama", 4), ROWS, ci.CoreConfig(beta=0.3), **asked)
    np.testing.assert_array_equal(one.tokens, many.tokens)
    check_same_core(one.core, many.core)
    assert one.stats.drafting.regathered == many.stats.drafting.regathered > 0
    assert one.stats.drafting.drift == many.stats.drafting.drift


@pytest.mark.slow
def test_a_calibrated_text_has_the_neurons_chosen_of_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are of what linear neurons leave, which ask for what MLPs read."""
    params, core = explained(random_model(LLAMA)), ci.CoreConfig(beta=0.3, allocation="equal")
    with followed(monkeypatch) as made:
        out = ci.generate(params, PROMPTS, core, max_new_tokens=NEW, lossless=True, regather_at=0.0)
    known, _ = made["gathered"][-1]
    assert any(out.core.linear)
    texts = [prompt + row.tolist() for prompt, row in zip(PROMPTS, out.tokens, strict=True)]
    check_same_core(out.core, ci.generate(params, beginnings(texts, known.summed), core, max_new_tokens=1).core)


@pytest.mark.slow
def test_a_conversation_goes_on_from_a_turn_that_followed_its_text() -> None:
    params, tokens, past = random_model(LLAMA), PROMPTS[0], None
    for new in (70, 5):
        chunks = list(ci.converse(params, tokens, past, FEW, max_new_tokens=new, lossless=True, regather_at=0.0))
        past = chunks[-1][1]
        made = [int(i) for chunk, _ in chunks for i in chunk.tokens[0, : chunk.lengths[0]]]
        assert made == ci.generate(params, [tokens], None, max_new_tokens=new).tokens[0].tolist()
        tokens = [*tokens, *made, 7]
    assert chunks[-1][0].stats.cached_tokens == (len(PROMPTS[0]),)


def test_nothing_is_gathered_where_there_is_no_time_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "_measured", lambda run: (run, Seconds(single=1e-9, verify=1e-9, step=1e-12)))
    out, _ = lossless_and_dense(FEW, regather_at=0.0)
    assert (out.stats.drafting.regathered, out.stats.drafting.drift) == (0, None)
    assert out.stats.drafting.regathering_milliseconds > 0  # of summing up


def test_what_following_takes_is_in_the_account() -> None:
    state, costs = no_drafts([100, 100]), jnp.asarray([1.5, 0.25])
    watched = no_passes(random_model(LLAMA), np.zeros(2, np.int32), places=8, layers=(0, 2))
    charged = replace(state, watched=replace(watched, taken=jnp.float32(1.25)))
    assert float(spare_time(charged, costs)) == pytest.approx(float(spare_time(state, costs)) - 1.25)


@pytest.mark.parametrize(
    ("core", "options", "expected"),
    [
        (FEW, {"regather_at": 0.0}, True),
        (SHARED_VOTES, {"regather_at": 0.5}, True),
        (FEW, {}, False),
        (FEW, {"regather_at": None}, False),
        ("recommended", {"regather_at": 0.0}, False),
    ],
)
def test_core_neurons_follow_where_they_are_asked_to_and_can(core: object, options: Any, expected: bool) -> None:
    asked = {"lossless": True, "max_new_tokens": NEW} | options
    assert make_request(random_model(LLAMA), PROMPTS, core, asked).regathers == expected


def test_no_more_weights_are_narrowed_than_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sets while others are gathered, whichever time it is."""
    gathered, there = Regathering.gathered, []

    def counted(self: Regathering, chosen: Chosen) -> Any:
        known, narrow = gathered(self, chosen)
        shape = narrow.layers[1].mlp.up.weight.shape
        there.append(sum(array.shape == shape for array in jax.live_arrays()))
        return known, narrow

    monkeypatch.setattr(Regathering, "gathered", counted)
    gc.collect()  # of what earlier tests left
    lossless_and_dense(FEW, regather_at=0.0)
    # The model gates: up and gate of the layers that keep as many.
    assert len(there) > 1
    assert len(set(there)) == 1


def test_what_is_watched_is_counted_as_memory() -> None:
    params, asked = random_model(LLAMA), {"lossless": True, "max_new_tokens": NEW}
    stays = make_request(params, PROMPTS, FEW, asked)
    follows = make_request(params, PROMPTS, FEW, asked | {"regather_at": 0.0})
    watched = no_passes(params, np.zeros(len(PROMPTS), np.int32), places=watched_places(1), layers=follows.observed)
    kept, sets = follows.gathered
    narrowed = sum(3 * sets * width * LLAMA.hidden_size * 4 for width in kept)
    added = follows.added_bytes - stays.added_bytes
    assert added == pytest.approx(narrowed + watched.inputs.nbytes + watched.activations.nbytes)
    short = asked | {"max_new_tokens": LOOK_EVERY}
    assert not make_request(params, PROMPTS, FEW, short | {"regather_at": 0.0}).regathers


def test_nothing_is_watched_on_where_core_neurons_do_not_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "_measured", lambda run: (run, Seconds(single=1.0, verify=1.0)))
    states = _states(monkeypatch)
    lossless_and_dense(FEW, regather_at=0.0)
    assert states
    assert all(state.watched is None for state in states)


def _states(monkeypatch: pytest.MonkeyPatch) -> list[Drafted]:
    """What passes are given, in order."""
    states, decode = [], lossless.decode_drafted

    def spied(params: ci.Params, narrow: ci.Params, state: Drafted, *rest: Any, size: int) -> Any:
        states.append(state)
        return decode(params, narrow, state, *rest, size=size)

    monkeypatch.setattr(lossless, "decode_drafted", spied)
    return states


def test_nothing_is_watched_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    states = _states(monkeypatch)
    out = ci.generate(random_model(LLAMA), PROMPTS, FEW, max_new_tokens=NEW, lossless=True)
    assert states
    assert all(state.watched is None for state in states)
    assert (out.stats.drafting.regathered, out.stats.drafting.drift) == (0, None)


def test_a_drafter_is_forgotten_alone() -> None:
    trust = Trust(jnp.asarray([[2.0, 3.0]]), jnp.asarray([[1.0, 2.0]])).forgotten(CORE)
    np.testing.assert_array_equal(trust.reached, [[0, 3]])
    np.testing.assert_array_equal(trust.accepted[:, LOOKUP], [2])


@pytest.mark.parametrize(
    "core",
    [
        None,
        ci.CoreNeurons([range(9)] * 3),
        ci.Auto(),
        replace(SHARED_VOTES, rule=ci.rules.Votes(budget="mean")),
    ],
)
def test_core_neurons_that_stay_are_refused(core: object) -> None:
    with pytest.raises(ci.CoreInferError, match=r"regather_at=0.5: core neurons of this kind stay as they are"):
        ci.generate(random_model(LLAMA), PROMPTS, core, max_new_tokens=NEW, lossless=True, regather_at=0.5)


def test_mistakes_are_refused() -> None:
    params = random_model(LLAMA)
    with pytest.raises(ci.CoreInferError, match=r"regather_at=1.5: give a share from 0 to 1"):
        ci.generate(params, PROMPTS, FEW, lossless=True, regather_at=1.5)
    with pytest.raises(ci.CoreInferError, match=r"regather_at=0.1: is of lossless generation; add lossless"):
        ci.generate(params, PROMPTS, FEW, regather_at=0.1)
    with pytest.raises(ci.CoreInferError, match=r"regather_at=0.1: of a model whose MLPs stay on the host"):
        ci.generate(with_mlps_on_host(params), PROMPTS, FEW, max_new_tokens=NEW, lossless=True, regather_at=0.1)
