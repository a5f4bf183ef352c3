"""Lossless decoding with MLPs on the host: the resident full model's tokens, and fewer bytes moved for them."""

import gc
from dataclasses import replace
from math import ceil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.engine import lossless
from coreinfer_jax.engine.drafting import CORE
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.loop import begin
from coreinfer_jax.engine.streamed_verification import decode_drafted_streamed
from coreinfer_jax.engine.verification import nothing_drafted
from coreinfer_jax.model.backends import draft_size
from coreinfer_jax.model.host import mlp_bytes
from tests.support import LLAMA, MODELS, OPT, random_model, with_mlps_on_host
from tests.test_compilation import traced
from tests.test_lossless import DRAWN, FEW, PROMPTS, SIZE, dense
from tests.test_on_host import write_random

NEW = 30


def whole_bytes(params: ci.Params) -> int:
    return sum(mlp_bytes(layer.mlp) for layer in params.layers)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("opt", {}),
        ("llama", DRAWN),
        pytest.param("llama", {}, marks=pytest.mark.slow),
        pytest.param("opt", DRAWN, marks=pytest.mark.slow),
    ],
    ids=["opt-greedy", "llama-drawn", "llama-greedy", "opt-drawn"],
)
def test_batches_are_the_resident_full_models(name: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "BEST", 2)  # every pass verifies a draft, whatever that costs
    on_host = with_mlps_on_host(random_model(MODELS[name]))
    out = ci.generate(on_host, PROMPTS, FEW, max_new_tokens=NEW, lossless=True, **options)
    np.testing.assert_array_equal(out.tokens, dense(name, NEW, **options).tokens)
    drafting = out.stats.drafting
    assert drafting.tokens == out.lengths.sum() - len(PROMPTS)
    assert drafting.single_passes + drafting.verifications == out.stats.decode_steps
    assert drafting.core_steps > 10
    kept = sum(sum(own.shape[-1] for own in out.core.row(b).layers) for b in range(len(PROMPTS)))
    moved = whole_bytes(on_host) * (1 + out.stats.decode_steps)
    narrowed = whole_bytes(on_host) * kept / (3 * on_host.config.mlp_size)
    assert out.stats.moved_bytes == pytest.approx(moved + narrowed, rel=1e-3)


def drafted_for_itself(drafter: ci.Params, steps: int, **options: object) -> tuple:
    """New tokens of LLAMA on the host and the last state, `steps` tokens drafted by `drafter` for every pass."""
    on_host = with_mlps_on_host(random_model(LLAMA))
    asked = {"max_new_tokens": NEW, "lossless": True, **options}
    rows = begin(make_request(on_host, PROMPTS, None, asked)).rows
    state = nothing_drafted(rows, SIZE)
    costs = jnp.ones(2, jnp.float32)
    state, made, count = decode_drafted_streamed(
        on_host.weights, drafter, {}, state, np.int32(64), costs, np.int32(1 + steps), size=SIZE
    )
    return np.array(made), np.array(count), state


def test_what_is_always_accepted_moves_weights_once_per_block() -> None:
    made, _, state = drafted_for_itself(random_model(LLAMA), SIZE)
    np.testing.assert_array_equal(made[:, : NEW - 1], dense("llama", NEW).tokens[:, 1:])
    assert int(state.verified) == ceil((NEW - 1) / (1 + SIZE))
    np.testing.assert_array_equal(state.reached, state.accepted)


@pytest.mark.slow
def test_what_is_always_rejected_costs_no_token() -> None:
    full = random_model(LLAMA)
    # What the full model finds most likely, this drafter finds least likely.
    made, _, state = drafted_for_itself(replace(full, unembedding=-full.unembedding), 2)
    np.testing.assert_array_equal(made[:, : NEW - 1], dense("llama", NEW).tokens[:, 1:])
    assert int(state.core_steps) == 2 * int(state.verified)
    assert np.array(state.reached[CORE]).sum() > 0
    assert np.array(state.accepted[CORE]).sum() == 0


@pytest.mark.slow
def test_rows_end_within_a_draft() -> None:
    expected = dense("llama", NEW).tokens
    ends = (int(expected[0, 2]),)
    ended = ci.generate(random_model(LLAMA), PROMPTS, None, max_new_tokens=NEW, eos_ids=ends)
    made, count, state = drafted_for_itself(random_model(LLAMA), SIZE, eos_ids=ends)
    assert ended.lengths[0] == 3  # behind it, two tokens of the first draft are left
    assert (ended.lengths[1:] == NEW).any()  # and here the budget ends within one
    assert count.tolist() == (ended.lengths - 1).tolist()
    for row, n, own in zip(made, count, ended.tokens, strict=True):
        assert row[:n].tolist() == own[1 : n + 1].tolist()
    assert np.array(state.rows.done).all()


def test_a_text_that_repeats_itself_moves_fewer_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of a model that always writes the same few tokens, drafted by earlier words."""
    monkeypatch.setattr(lossless, "BEST", 1)  # every pass verifies what was looked up, whatever that costs
    params = random_model(replace(OPT, num_layers=1))
    on_host, prompt = with_mlps_on_host(params), [[5, 6, 7] * 6]
    plain = ci.generate(on_host, prompt, None, max_new_tokens=50)
    out = ci.generate(on_host, prompt, None, max_new_tokens=50, lossless=True)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    passes = out.stats.drafting.single_passes + out.stats.drafting.verifications
    assert out.stats.moved_bytes == whole_bytes(on_host) * (1 + passes)
    assert sum(out.stats.drafting.accepted["lookup"]) > 5
    assert out.stats.moved_bytes < plain.stats.moved_bytes


@pytest.mark.slow
def test_layers_that_stay_dense_are_not_moved_again() -> None:
    on_host = with_mlps_on_host(random_model(OPT))
    core = replace(FEW, layers=(0.3, 1.0))
    out = ci.generate(on_host, PROMPTS[:1], core, max_new_tokens=NEW, lossless=True)
    np.testing.assert_array_equal(out.tokens, dense("opt", NEW).tokens[:1])
    whole, first = whole_bytes(on_host), mlp_bytes(on_host.layers[0].mlp)
    kept = sum(out.stats.kept_neurons) * first / on_host.config.mlp_size
    expected = whole + kept + out.stats.decode_steps * (whole - first)
    assert out.stats.moved_bytes == pytest.approx(expected, rel=1e-3)


def test_conversations_and_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "BEST", 2)  # every pass verifies a draft, whatever that costs
    params, tokens, past = random_model(OPT), PROMPTS[0], None
    on_host = with_mlps_on_host(params)
    for _ in range(2):
        chunks = list(ci.converse(on_host, tokens, past, None, max_new_tokens=20, lossless=True))
        past = chunks[-1][1]
        made = [int(i) for chunk, _ in chunks for i in chunk.tokens[0, : chunk.lengths[0]]]
        assert made == ci.generate(params, [tokens], None, max_new_tokens=20).tokens[0].tolist()
        tokens = [*tokens, *made[:3], 7]


def test_another_prompt_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lossless, "BEST", 2)  # every pass verifies a draft, whatever that costs
    on_host = with_mlps_on_host(random_model(OPT))
    settings = {"max_new_tokens": 20, "lossless": True, "device_memory": "1GiB"}
    ci.generate(on_host, PROMPTS[:1], FEW, **settings)
    with traced() as messages:
        ci.generate(on_host, [PROMPTS[0][::-1]], FEW, **settings)
    assert messages == []


def test_a_checkpoint_cut_short_between_verifications_ends_in_its_error(tmp_path: Path) -> None:
    on_host, _ = ci.load(write_random(tmp_path), "float32", mlps_on_host=True)
    gc.collect()
    live = len(jax.live_arrays())
    chunks = ci.stream(on_host, PROMPTS[:1], FEW, max_new_tokens=60, lossless=True)
    next(chunks)
    assert next(chunks).stats.drafting.verifications > 0
    weights = tmp_path / "weights-00001-of-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ci.CoreInferError, match=r"weights-.*\.safetensors: .*let nothing write to it"):
        list(chunks)
    del chunks
    gc.collect()
    assert len(jax.live_arrays()) <= live


def test_on_accelerators_streamed_drafts_are_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    table = random_model(OPT).token_embedding
    assert draft_size(table, 1, streams=True) == draft_size(table, 1)
    monkeypatch.setattr("coreinfer_jax.model.backends.width_multiple", lambda weight: 128)
    assert draft_size(table, 4, streams=True) > draft_size(table, 4)
