"""Decoding: the same numbers as a full forward, whatever the batch, the chunking and the settings."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.model import extend, unembed
from coreinfer_jax.model.cache import KVCache, bucket, init_cache
from tests.support import LLAMA, MODELS, OPT, check_same_core, half_slow, one_quick_in, random_model
from tests.test_votes import reference_selection

RNG = np.random.default_rng(0)
# The paper's rule at any keep ratio.
VOTES = ci.CoreConfig.paper()
PROMPTS = [RNG.integers(3, 101, n).tolist() for n in (23, 1, 100)]


@jax.jit
def run_all(params: ci.Params, tokens: jax.Array, cache: KVCache, start: jax.Array) -> tuple[jax.Array, KVCache, tuple]:
    """Logits [B, T, V], cache and every layer's activations [B, T, F]."""
    hidden, cache, seen = extend(params, tokens, cache, start, lambda l, layer, seen: seen.activations)
    return unembed(params, hidden), cache, seen


def empty_cache(params: ci.Params, rows: int) -> KVCache:
    return init_cache(params.config, rows, params.config.max_positions, jnp.dtype("float32"))


def greedy_reference(params: ci.Params, prompt: list[int], core: ci.CoreNeurons | None, new: int) -> list[int]:
    """Greedy tokens without decode steps: the full model reads the prompt and gives the first token; then the narrow
    model runs all new tokens so far in one pass over the prompt's cache, once per token."""
    T = len(prompt)
    narrow = params if core is None else ci.compact(params, core)
    logits, cache, _ = run_all(params, jnp.asarray([prompt]), empty_cache(params, 1), jnp.zeros(1, jnp.int32))
    tokens = np.zeros((1, new), np.int32)
    tokens[0, 0] = logits[0, -1].argmax()
    for t in range(1, new):  # what stands after position t - 1 does not matter to it: attention is causal
        logits, _, _ = run_all(narrow, jnp.asarray(tokens), cache, jnp.full(1, T, jnp.int32))
        tokens[0, t] = logits[0, t - 1].argmax()
    return tokens[0].tolist()


def prompt_activations(params: ci.Params, prompt: list[int]) -> list[np.ndarray]:
    """Every layer's MLP activations [T, F] over a prompt."""
    _, _, seen = run_all(params, jnp.asarray([prompt]), empty_cache(params, 1), jnp.zeros(1, jnp.int32))
    return [np.asarray(a[0]) for a in seen]


@pytest.mark.parametrize("filled", [14, 15])
def test_all_that_is_attended_to_is_what_is_filled(filled: int) -> None:
    params = random_model(LLAMA)
    tokens = jnp.asarray(np.random.default_rng(2).integers(3, 101, (2, 15)))
    _, cache, _ = run_all(params, tokens[:, :9], empty_cache(params, 2), jnp.zeros(2, jnp.int32))
    later = partial(extend, params, tokens[:, 9:], cache, jnp.full(2, 9, jnp.int32), lambda l, layer, a: None)
    whole, narrow = later()[0], later(filled=filled)[0]
    unseen = 15 - filled
    np.testing.assert_allclose(narrow[:, : 6 - unseen], whole[:, : 6 - unseen], atol=1e-5)
    assert (np.abs(narrow[:, -1] - whole[:, -1]).max() > 1e-3) == bool(unseen)


@pytest.mark.parametrize("name", half_slow(MODELS))
def test_prefill_and_single_steps_equal_one_forward(name: str) -> None:
    params = random_model(MODELS[name])
    tokens = jnp.asarray(np.random.default_rng(1).integers(3, 101, (2, 12)))
    logits, cache, _ = run_all(params, tokens[:, :7], empty_cache(params, 2), jnp.zeros(2, jnp.int32))
    steps = [logits]
    for t in range(7, 12):
        logits, cache, _ = run_all(params, tokens[:, t : t + 1], cache, jnp.full(2, t, jnp.int32))
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), ci.forward(params, tokens), atol=1e-4)


@pytest.mark.parametrize("name", half_slow(MODELS))
def test_generate_equals_a_plain_loop_on_the_prompts_own_core_neurons(name: str) -> None:
    params, prompt = random_model(MODELS[name]), PROMPTS[0]
    out = ci.generate(params, [prompt], replace(VOTES, rule=ci.rules.Votes(alpha=0.3), beta=0.5), max_new_tokens=20)
    for l, a in enumerate(prompt_activations(params, prompt)):
        np.testing.assert_array_equal(out.core.layers[l], reference_selection(a, 0.3, 0.5, "per_token"))
    assert out.tokens.dtype == out.lengths.dtype == np.int32
    assert out.tokens[0].tolist() == greedy_reference(params, prompt, out.core, 20)
    assert out.lengths.tolist() == [20]
    assert out.stats.method == "stability"
    assert out.stats.kept_neurons == (48, 48, 48)


@pytest.mark.parametrize("name", half_slow(MODELS))
def test_dense_generation_equals_a_plain_loop(name: str) -> None:
    params = random_model(MODELS[name])
    out = ci.generate(params, [PROMPTS[1]], None, max_new_tokens=15)
    assert out.core is None
    assert out.stats.method == "dense"
    assert out.tokens[0].tolist() == greedy_reference(params, PROMPTS[1], None, 15)


@pytest.mark.parametrize(
    ("name", "core"),
    [
        ("opt-350m-style", replace(VOTES, rule=ci.rules.Votes(budget="mean"), layers=(0.5, 1.0))),
        ("llama", ci.CoreConfig()),
        pytest.param("opt", ci.CoreConfig(), marks=pytest.mark.slow),
        pytest.param("relu-llama", None, marks=pytest.mark.slow),
    ],
)
def test_rows_of_a_padded_batch_equal_their_single_runs(name: str, core: ci.CoreConfig | None) -> None:
    params = random_model(MODELS[name])
    batch = ci.generate(params, PROMPTS, core, max_new_tokens=12)
    for b, prompt in enumerate(PROMPTS):
        single = ci.generate(params, [prompt], core, max_new_tokens=12)
        assert batch.tokens[b].tolist() == single.tokens[0].tolist()
        assert (batch.core is None) == (core is None)
        if core is not None:
            check_same_core(batch.core.row(b), single.core)


@pytest.mark.parametrize(("name", "dtype"), one_quick_in(4, MODELS, ["bfloat16", "float16"]))
def test_16_bit_batches_decode_what_one_forward_gives(name: str, dtype: str) -> None:
    params = random_model(MODELS[name], dtype=dtype)
    for core in (None, ci.CoreConfig(beta=1.0), ci.CoreConfig(beta=1.0, per_row=False)):
        out = ci.generate(params, PROMPTS, core, max_new_tokens=6)
        texts = [prompt + row.tolist() for prompt, row in zip(PROMPTS, out.tokens, strict=True)]
        longest = max(map(len, texts))  # attention is causal: what fills up the shorter rows changes nothing before it
        filled = ci.forward(params, [text + [0] * (longest - len(text)) for text in texts])
        for row, prompt, own in zip(out.tokens, PROMPTS, np.asarray(filled), strict=True):
            logits = own[len(prompt) - 1 :][: len(row)]
            behind = logits.max(axis=-1) - np.take_along_axis(logits, row[:, None], axis=-1)[:, 0]
            # The two passes round differently; the token taken is among the best up to 16-bit rounding of the logits.
            assert (behind <= 0.05 * np.abs(logits).max()).all()


def test_one_set_for_all_rows_is_their_joint_vote_and_each_row_equals_a_run_given_it() -> None:
    params = random_model(OPT)
    shared = ci.generate(params, PROMPTS, replace(VOTES, beta=0.4, per_row=False), max_new_tokens=10)
    for l in range(OPT.num_layers):
        together = np.concatenate([prompt_activations(params, prompt)[l] for prompt in PROMPTS])
        np.testing.assert_array_equal(shared.core.layers[l], reference_selection(together, 0.4, 0.4, "per_token"))
    for b, prompt in enumerate(PROMPTS):
        given = ci.generate(params, [prompt], shared.core, max_new_tokens=10)
        assert given.stats.method == "given"
        assert given.core == shared.core
        assert shared.tokens[b].tolist() == given.tokens[0].tolist()


def test_a_shared_set_is_read_once_per_step_and_row_sets_once_per_row() -> None:
    params = random_model(LLAMA)
    mlp = 3 * 38 * 32 * 4 * LLAMA.num_layers  # three matrices of K x D float32 numbers in each layer
    cost = {
        per_row: ci.generate(params, PROMPTS[:2], replace(VOTES, beta=0.4, per_row=per_row), max_new_tokens=2).stats
        for per_row in (True, False)
    }
    assert 2 * (cost[True].bytes_read_per_token - cost[False].bytes_read_per_token) == mlp


@pytest.mark.parametrize("name", half_slow(MODELS))
def test_keeping_all_neurons_equals_dense(name: str) -> None:
    params = random_model(MODELS[name])
    dense = ci.generate(params, PROMPTS, None, max_new_tokens=12)
    whole = ci.generate(params, PROMPTS, ci.CoreConfig(beta=1.0), max_new_tokens=12)
    np.testing.assert_array_equal(whole.tokens, dense.tokens)
    assert whole.core == ci.CoreNeurons([None] * params.config.num_layers)
    gathered = ci.CoreNeurons([[range(96)] * 3] * params.config.num_layers)
    np.testing.assert_array_equal(ci.generate(params, PROMPTS, gathered, max_new_tokens=12).tokens, dense.tokens)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "key": 3}], ids=["greedy", "drawn"]
)
def test_stream_equals_generate(settings: dict[str, float]) -> None:
    params = random_model(LLAMA)
    out = ci.generate(params, PROMPTS, ci.CoreConfig(), max_new_tokens=30, **settings)
    chunks = list(ci.stream(params, PROMPTS, ci.CoreConfig(), max_new_tokens=30, **settings))
    np.testing.assert_array_equal(np.concatenate([chunk.tokens for chunk in chunks], axis=1), out.tokens)
    assert [chunk.tokens.shape[1] for chunk in chunks] == [1, 8, 8, 8, 5]
    assert chunks[-1].core == out.core
    assert [chunk.stats.decode_steps for chunk in chunks] == [0, 8, 16, 24, 29]


def test_the_first_token_does_not_wait_for_the_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gather(*_: object) -> None:
        raise AssertionError("gathered")

    monkeypatch.setattr("coreinfer_jax.sparsity.choice.narrow", no_gather)
    params = random_model(OPT)
    chunks = ci.stream(params, PROMPTS[:1], ci.CoreConfig(), max_new_tokens=3)
    assert next(chunks).stats.compaction_seconds == 0
    with pytest.raises(AssertionError, match="gathered"):
        next(chunks)
    assert ci.generate(params, PROMPTS[:1], ci.CoreConfig(), max_new_tokens=1).stats.compaction_seconds == 0


def test_the_gather_is_timed_between_the_first_and_the_second_token() -> None:
    first, *_, last = ci.stream(random_model(OPT), PROMPTS[:1], ci.CoreConfig(), max_new_tokens=12)
    assert first.stats.compaction_seconds == 0 < last.stats.compaction_seconds
    assert first.stats.kept_neurons == last.stats.kept_neurons
    assert first.stats.bytes_read_per_token == last.stats.bytes_read_per_token


def test_more_tokens_than_a_dispatch_holds() -> None:
    params = random_model(LLAMA)
    out = ci.generate(params, [[5, 6, 7]], ci.CoreConfig(), max_new_tokens=150)
    assert out.tokens[0, :20].tolist() == greedy_reference(params, [5, 6, 7], out.core, 20)
    assert out.stats.decode_steps == 149
    streamed = [
        t for chunk in ci.stream(params, [[5, 6, 7]], ci.CoreConfig(), max_new_tokens=150) for t in chunk.tokens[0]
    ]
    assert streamed == out.tokens[0].tolist()


def test_eos_ends_a_row_among_new_tokens_only() -> None:
    config = replace(OPT, pad_id=1)
    params = random_model(config)
    prompts = [[2, *PROMPTS[0]], [2, 2, 2]]
    free = ci.generate(params, prompts, ci.CoreConfig(), max_new_tokens=24)
    eos = int(free.tokens[0, 9])
    out = ci.generate(params, prompts, ci.CoreConfig(), max_new_tokens=24, eos_ids=(eos, 2))
    ends = [min([row.tolist().index(i) + 1 for i in (eos, 2) if i in row], default=24) for row in free.tokens]
    assert out.lengths.tolist() == ends
    assert min(ends) < 24
    assert out.fill_id == 1
    for row, before, end in zip(out.tokens, free.tokens, ends, strict=True):
        assert row[:end].tolist() == before[:end].tolist()
        assert (row[end:] == 1).all()


def test_generation_stops_when_every_row_is_done() -> None:
    params = random_model(OPT)
    first = int(ci.generate(params, [[2, 7]], ci.CoreConfig(), max_new_tokens=1).tokens[0, 0])
    out = ci.generate(params, [[2, 7]], ci.CoreConfig(), max_new_tokens=100, eos_ids=(first,))
    assert out.lengths.tolist() == [1]
    assert out.stats.decode_steps == 0
    assert out.tokens.shape == (1, 100)


def test_draws_come_from_the_documented_keys() -> None:
    params, key = random_model(LLAMA), jax.random.key(11)
    out = ci.generate(params, PROMPTS[:2], None, max_new_tokens=6, temperature=1.5, key=key)
    for b, prompt in enumerate(PROMPTS[:2]):
        logits = ci.forward(params, [prompt + out.tokens[b].tolist()])[0]
        for t in range(6):
            row_key = jax.random.fold_in(jax.random.fold_in(key, b), t)
            assert out.tokens[b, t] == jax.random.categorical(row_key, logits[len(prompt) - 1 + t] / 1.5)


def test_int_seed_and_raw_key_equal_the_typed_key() -> None:
    params = random_model(LLAMA)
    drawn = [
        ci.generate(params, [[5, 6]], ci.CoreConfig(), max_new_tokens=8, temperature=1.0, key=key).tokens.tolist()
        for key in (7, jax.random.key(7), jax.random.PRNGKey(7), np.int64(7))
    ]
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]
    other = ci.generate(params, [[5, 6]], ci.CoreConfig(), max_new_tokens=8, temperature=1.0, key=8).tokens.tolist()
    assert other != drawn[0]


def test_bos_can_be_kept_from_voting() -> None:
    params, prompt = random_model(OPT), [2, *PROMPTS[1]]
    out = ci.generate(params, [prompt], replace(VOTES, beta=0.4, count_bos=False), max_new_tokens=1)
    a = prompt_activations(params, prompt)[0][1:]
    np.testing.assert_array_equal(out.core.layers[0], reference_selection(a, 0.4, 0.4, "per_token"))
    without_bos = ci.generate(params, [prompt[1:]], replace(VOTES, beta=0.4, count_bos=False), max_new_tokens=1)
    a = prompt_activations(params, prompt[1:])[0]
    np.testing.assert_array_equal(without_bos.core.layers[0], reference_selection(a, 0.4, 0.4, "per_token"))


def test_narrowed_layers_are_a_fraction_of_depth() -> None:
    params = random_model(replace(OPT, num_layers=5))
    out = ci.generate(params, [PROMPTS[1]], ci.CoreConfig(beta=0.4, layers=(0.2, 0.8)), max_new_tokens=2)
    assert [indices is None for indices in out.core.layers] == [True, False, False, False, True]
    assert out.stats.kept_neurons == (96, 38, 38, 38, 96)


def test_a_prompt_can_fill_the_positions_exactly() -> None:
    params = random_model(OPT)
    prompt = np.random.default_rng(2).integers(3, 101, OPT.max_positions - 4).tolist()
    out = ci.generate(params, [prompt], ci.CoreConfig(), max_new_tokens=4)
    assert out.tokens[0].tolist() == greedy_reference(params, prompt, out.core, 4)


@pytest.mark.parametrize(("length", "expected"), [(1, 64), (64, 64), (65, 128), (128, 128), (1000, 1024)])
def test_buckets_are_powers_of_two_from_64(length: int, expected: int) -> None:
    assert bucket(length) == expected
