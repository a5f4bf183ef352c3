"""Rules against plain NumPy, written from their definitions."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreinfer_jax.lab.evaluation.settings import RANKINGS
from coreinfer_jax.model.weights import Linear
from coreinfer_jax.sparsity.ranking import _all_at_once, _each_alone
from coreinfer_jax.sparsity.rules import RULES, Rule, mean_activations, places, with_prior
from tests.support import LLAMA, half_slow, random_model

B, T, F, ALPHA = 2, 12, 40, 0.4


def activations(seed=0, relu=False):
    a = np.random.default_rng(seed).normal(size=(B, T, F)).astype(np.float32)
    return np.maximum(a, 0) if relu else a


COUNTED = np.array([[True] * T, [True] * 7 + [False] * 5])
NORMS = np.random.default_rng(9).uniform(0.5, 2, F).astype(np.float32)


def token_sets(a, budget):
    """Which neurons each token of one row [T, F] votes for: its largest positive ones."""
    positives = (a > 0).sum(axis=1)
    counts = positives if budget == "per_token" else np.full(len(a), positives.mean())
    chosen = np.zeros(a.shape, bool)
    for t, row in enumerate(a):
        voices = min(int(np.floor(ALPHA * counts[t] + 1e-6)), positives[t])
        chosen[t, np.argsort(-row, kind="stable")[:voices]] = True
    return chosen


def by_two(first, second):
    """Neurons, the best first."""
    return np.lexsort((np.arange(F), -second, -first))


def expected_order(rule, a, norms):
    """The neurons of one row's counted tokens a [T, F], the best first."""
    a, squared = a.astype(np.float64), norms.astype(np.float64) ** 2
    if rule in ("votes", "votes-mean-budget"):
        return by_two(token_sets(a, "mean" if "mean" in rule else "per_token").sum(axis=0), a.sum(axis=0))
    if rule == "magnitude-votes":
        return by_two(token_sets(np.abs(a), "per_token").sum(axis=0), np.abs(a).sum(axis=0))
    relative = np.linalg.norm(a / np.linalg.norm(a, axis=1, keepdims=True), axis=0)
    written = a * norms
    shares = written / np.linalg.norm(written, axis=1, keepdims=True)
    scores = {
        "griffin": relative,
        "griffin-norm": relative * norms,
        "energy": (a**2).mean(axis=0) * squared,
        "contribution": (shares**2).sum(axis=0),
        "norm": norms,
    }[rule]
    return np.argsort(-scores, kind="stable")


# A layer whose neurons write by NORMS: each one number.
LAYER = SimpleNamespace(mlp=SimpleNamespace(down=Linear(jnp.asarray(NORMS[None]))))


def sums_of(rule, a, counted=COUNTED):
    return RANKINGS[rule].observer(counted, F)(0, LAYER, SimpleNamespace(activations=jnp.asarray(a)))


def scores_of(rule, a, compensation=0.0):
    return np.asarray(RANKINGS[rule].score(sums_of(rule, a), jnp.asarray(NORMS), jnp.float32(compensation)))


@pytest.mark.parametrize(("rule", "relu"), half_slow(sorted(set(RANKINGS) - {"random"}), [False, True]))
def test_a_rule_ranks_as_numpy_does(rule, relu):
    a = activations(relu=relu)
    found = np.asarray(places(jnp.asarray(scores_of(rule, a))))
    for b in range(B):
        order = expected_order(rule, a[b, COUNTED[b]], NORMS)
        np.testing.assert_array_equal(np.argsort(found[b]), order)


def test_random_ranks_all_rows_alike_and_knows_nothing_of_them():
    first, second = (scores_of("random", activations(seed)) for seed in (0, 1))
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first[0])) == F


@pytest.mark.parametrize("rule", sorted(set(RANKINGS) - {"votes-mean-budget"}))  # whose budget is of the whole prompt
def test_sums_of_parts_add_up_to_those_of_the_whole(rule):
    a = activations()
    parts = [sums_of(rule, a[:, start : start + 4], COUNTED[:, start : start + 4]) for start in (0, 4, 8)]
    added = jax.tree.map(lambda *arrays: sum(np.asarray(x, np.float64) for x in arrays), *parts)
    for name, whole in sums_of(rule, a).items():
        np.testing.assert_allclose(added[name], whole, rtol=1e-6, atol=1e-6)


def token_weights(rule, a):
    """Of one row's counted tokens a [T, F]."""
    scaled = {"griffin": a, "griffin-norm": a, "contribution": a * NORMS}
    return 1 / (scaled[rule] ** 2).sum(axis=1) if rule in scaled else np.ones(len(a))


@pytest.mark.parametrize("rule", RANKINGS)
def test_means_are_of_counted_tokens_by_their_weights(rule):
    a = activations()
    rows = [a[b, COUNTED[b]].astype(np.float64) for b in range(B)]
    expected = [np.average(row, axis=0, weights=token_weights(rule, row)) for row in rows]
    np.testing.assert_allclose(mean_activations(sums_of(rule, a)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("rule", ["energy", "contribution", "griffin-norm"])
def test_scores_are_what_dropping_changes_where_a_share_of_the_mean_stays(rule, share):
    a = activations()
    found = scores_of(rule, a, share)
    for b in range(B):
        row = a[b, COUNTED[b]].astype(np.float64)
        weights = token_weights(rule, row)
        mean = np.average(row, axis=0, weights=weights)
        expected = ((row - share * mean) ** 2 * weights[:, None]).sum(axis=0) * NORMS.astype(np.float64) ** 2
        np.testing.assert_allclose(found[b], expected, rtol=1e-4)


@pytest.mark.parametrize("rule", ["contribution", "griffin", "energy"])
def test_a_prompt_of_zeros_ranks_by_index(rule):
    found = scores_of(rule, np.zeros((B, T, F), np.float32), 0.5)
    np.testing.assert_array_equal(found, np.zeros((B, F)))
    np.testing.assert_array_equal(mean_activations(sums_of(rule, np.zeros((B, T, F), np.float32))), found)


def test_a_prior_counts_as_so_many_of_its_own_tokens():
    a, corpus = activations(), activations(seed=3)
    prior = jax.tree.map(lambda array: array[0], sums_of("energy", corpus))
    mixed = with_prior(sums_of("energy", a), prior, 5.0)
    expected = (a[0] ** 2).sum(axis=0) + 5 * (corpus[0] ** 2).mean(axis=0)
    np.testing.assert_allclose(mixed["squares"][0], expected, rtol=1e-5)
    assert mixed["tokens"].tolist() == [T + 5, 7 + 5]


def test_a_token_without_activations_adds_nothing_to_griffins_sums():
    a = activations()
    a[:, 3] = 0
    without = sums_of("griffin", np.delete(a, 3, 1), np.delete(COUNTED, 3, 1))
    np.testing.assert_allclose(sums_of("griffin", a)["squares"], without["squares"], rtol=1e-6)


def test_column_norms_are_those_of_what_a_neuron_writes():
    params = random_model(LLAMA)
    for layer in params.layers:
        norms = layer.mlp.down.input_norms()
        np.testing.assert_allclose(norms, np.linalg.norm(np.asarray(layer.mlp.down.weight), axis=0), rtol=1e-6)


def test_places_go_to_the_lower_index_first():
    assert places(jnp.asarray([[1.0, 3.0, 3.0, 2.0]])).tolist() == [[3, 0, 1, 2]]


def test_places_of_parts_go_to_the_best_of_each_first():
    assert places(jnp.asarray([[4.0, 3.0, 1.0, 2.0]]), 2).tolist() == [[0, 2, 3, 1]]


@pytest.mark.parametrize(("rule", "shards"), half_slow(RULES.values(), [1, 4]))
def test_layers_are_ranked_at_once_as_each_alone(rule: type[Rule], shards: int) -> None:
    """As GPUs do, and as CPUs do."""
    kept, rng = (40, 8, 8), np.random.default_rng(0)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(1, 6, shape).astype(np.float32))  # with ties

    sums = [
        {"tokens": drawn(2), "weight": drawn(2)}
        | {name: drawn(2, 96) for name in ("total", "squares", "votes", "magnitudes")}
        for _ in kept
    ]
    # The last layer as beside linear neurons, where no share of a mean stands.
    arguments = sums, [drawn(96) for _ in kept], [jnp.float32(share) for share in (0.5, 0.5, 0.0)]
    alone = _each_alone(*arguments, rule=rule, kept=kept, shards=shards)
    at_once = _all_at_once(*arguments, rule=rule, kept=kept, shards=shards)
    assert [best.shape for best in alone[0]] == [(2, K) for K in kept]
    for expected, found in zip(jax.tree.leaves(alone), jax.tree.leaves(at_once), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
