"""Selection against plain NumPy, written from the definitions and sharing no code with the package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.sparsity.votes import ACCELERATOR_BITS, _budgets, _count_block, count_each, count_votes, make_voting


def reference_votes(a: np.ndarray, alpha: float, budget: str) -> np.ndarray:
    """Votes [F] of activations [T, F], token by token, by sorting."""
    positives = [int((row > 0).sum()) for row in a]
    votes = np.zeros(a.shape[1], np.int64)
    for row, own in zip(a, positives, strict=True):
        allowed = int(np.floor(alpha * (own if budget == "per_token" else np.mean(positives))))
        ranked = sorted((n for n in range(len(row)) if row[n] > 0), key=lambda n: (-row[n], n))
        votes[ranked[:allowed]] += 1
    return votes


def reference_selection(a: np.ndarray, alpha: float, beta: float, budget: str) -> np.ndarray:
    votes, sums = reference_votes(a, alpha, budget), a.astype(np.float64).sum(axis=0)
    ranked = sorted(range(a.shape[1]), key=lambda n: (-votes[n], -sums[n], n))
    return np.sort(ranked[: max(1, int(np.floor(beta * a.shape[1] + 1e-9)))])


def activations(kind: str, T: int, F: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((T, F)).astype(np.float32)
    if kind == "ties":  # few distinct values, exactly summable in float32
        return np.round(a * 2) / 2
    if kind == "relu":
        return np.maximum(a - 1, 0)
    if kind == "rows-without-positives":
        a[::2] = -np.abs(a[::2])
    if kind == "none-positive":
        return -np.abs(a)
    if kind == "extremes":
        return a * np.float32(10.0) ** rng.integers(-37, 38, (T, F)).astype(np.float32)
    return a


KINDS = ("normal", "ties", "relu", "rows-without-positives", "none-positive", "extremes")


SIZES = [(1, 100), (7, 100), (33, 257), (150, 60)]
SHARES = [(0.4, 0.4), (0.2, 0.25), (1.0, 0.5), (0.4, 1.0), (0.05, 0.001), (0.29, 0.7)]


@pytest.mark.parametrize("budget", ["per_token", "mean"])
@pytest.mark.parametrize("case", range(len(SHARES)), ids=map(str, SHARES))
@pytest.mark.parametrize("kind", KINDS)
def test_selection_equals_numpy(kind: str, case: int, budget: str) -> None:
    alpha, beta = SHARES[case]  # with two of the sizes each: every pair is a program
    for seed in (case % len(SIZES), (case + 2) % len(SIZES)):
        T, F = SIZES[seed]
        a = activations(kind, T, F, seed)
        chosen = ci.select_core_neurons(a, alpha=alpha, beta=beta, budget=budget)
        assert chosen.dtype == jnp.int32
        np.testing.assert_array_equal(chosen, reference_selection(a, alpha, beta, budget))


@pytest.mark.parametrize("budget", ["per_token", "mean"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_votes_of_16_bit_activations_equal_numpy(dtype: str, budget: str) -> None:
    a = jnp.asarray(activations("normal", 20, 300, seed=3), dtype)
    votes = count_votes(a[None], make_voting(np.ones((1, 20), bool), 300, 0.4, budget))
    expected = reference_votes(np.asarray(a, np.float32), 0.4, budget)
    np.testing.assert_array_equal(votes.counts[0], expected)


@pytest.mark.parametrize("budget", ["per_token", "mean"])
def test_uncounted_tokens_neither_vote_nor_break_ties_nor_move_the_mean(budget: str) -> None:
    a = activations("normal", 150, 120, seed=4)
    counted = np.random.default_rng(5).random((1, 150)) < 0.6
    votes = count_votes(jnp.asarray(a[None]), make_voting(counted, 120, 0.4, budget))
    np.testing.assert_array_equal(votes.counts[0], reference_votes(a[counted[0]], 0.4, budget))
    np.testing.assert_allclose(votes.sums[0], a[counted[0]].sum(axis=0), rtol=1e-5, atol=1e-5)


def test_votes_can_be_counted_inside_a_jit_with_any_alpha_in_one_program() -> None:
    a = jnp.asarray(activations("normal", 9, 64, seed=6))
    traces = []

    @jax.jit
    def votes(a, voting):
        traces.append(1)
        return count_votes(a[None], voting).counts[0]

    for alpha in (0.2, 0.5, 0.9):
        counted = votes(a, make_voting(np.ones((1, 9), bool), 64, alpha, "per_token"))
        np.testing.assert_array_equal(counted, reference_votes(np.asarray(a), alpha, "per_token"))
    assert len(traces) == 1


def test_keep_ratio_is_exact_where_floating_point_is_not() -> None:
    a = activations("normal", 3, 100, seed=7)
    assert 0.29 * 100 < 29
    assert ci.select_core_neurons(a, beta=0.29).shape == (29,)


@pytest.mark.parametrize("tokens", [64, 100, 192])
def test_early_tokens_votes_are_counted_apart_in_every_block(tokens: int) -> None:
    a = activations("normal", tokens, 60, seed=8)
    everyone, first = np.ones((1, tokens), bool), np.arange(tokens)[None] < 70
    voting = make_voting(everyone, 60, 0.4, "per_token")
    votes, early = count_each(jnp.asarray(a[None]), voting, (jnp.asarray(everyone), jnp.asarray(first)))
    np.testing.assert_array_equal(votes.counts[0], reference_votes(a, 0.4, "per_token"))
    np.testing.assert_array_equal(early.counts[0], reference_votes(a[:70], 0.4, "per_token"))
    np.testing.assert_allclose(early.sums[0], a[:70].sum(axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerator_that_finds_several_bits_at_once_chooses_the_same(kind: str, dtype: str) -> None:
    for seed, (T, F) in enumerate([(1, 3), (7, 100), (33, 257), (5, 1024)]):
        a = jnp.asarray(activations(kind, T, F, seed), dtype)[None]
        for alpha in (0.05, 0.4, 1.0):
            voting = make_voting(np.ones((1, T), bool), F, alpha, "per_token")
            several = _count_block(a, _budgets(a, voting), (voting.counted,), bits=ACCELERATOR_BITS)[0]
            np.testing.assert_array_equal(
                several.counts[0], reference_votes(np.asarray(a[0], np.float32), alpha, "per_token")
            )
