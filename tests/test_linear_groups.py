"""Linear neurons beside neurons that groups of texts choose: sets and offsets against plain NumPy, and bytes."""

from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.model import extend, observe_nothing
from coreinfer_jax.model.cache import init_cache
from coreinfer_jax.sparsity.choice import Chooser
from tests import test_linear
from tests.support import check_same_core, half_slow, random_model, with_mlps_on_host
from tests.test_bad_input import refusal
from tests.test_linear import with_stand_ins
from tests.test_prediction import (
    AUTO,
    FUSED,
    OPT,
    SIMILARITY,
    STEADY,
    F,
    L,
    activations,
    clusters,
    prompt,
    reference_group,
    reference_votes,
    same,
    top,
    voted,
)

# Of 48 neurons that a keep ratio of a half asks for: 8 linear neurons cost what 8 others do.
KEPT = F // 2 - 8
# A prompt that is stable, and one that is not.
LONG, SHORT = prompt(64, 2), prompt(9, 1)

known = cache(lambda: test_linear.explained(random_model(OPT)))


@cache
def groups(core: Chooser = SIMILARITY, compacted: bool = False) -> ci.Groups:
    return ci.prepare_groups(known(), clusters(), core, compacted=compacted)


def generate(tokens: list[int], core: Chooser, ready: ci.Groups | None, **options: object) -> ci.Generation:
    return ci.generate(known(), [tokens], core, groups=ready, **{"max_new_tokens": 9} | options)


def frequent(group: int) -> list[np.ndarray]:
    """The neurons of a group, per layer."""
    return [np.sort(np.argsort(-own, kind="stable")[:KEPT]) for own in clusters().frequencies[group]]


def check_offsets(core: ci.CoreNeurons) -> None:
    """What is constant of the neurons left out, from its definition."""
    fits = known().calibration.linear.fits
    assert core.linear == (True,) * L
    for layer, fit, kept, offset in zip(known().layers, fits, core.layers, core.offsets, strict=True):
        others = np.setdiff1d(np.arange(F), kept)
        down, constants = np.asarray(layer.mlp.down.weight, np.float64), np.asarray(fit.constants, np.float64)
        np.testing.assert_allclose(offset, down[:, others] @ constants[others], rtol=1e-4, atol=1e-5)


def test_a_group_decodes_with_what_its_set_leaves_to_them() -> None:
    ready = groups(compacted=True)
    for seed in range(3):
        out = generate(prompt(20, seed), SIMILARITY, ready)
        group = out.stats.choices[0].group
        assert group == reference_group(prompt(20, seed)) == seed
        for own, expected in zip(out.core.layers, frequent(group), strict=True):
            np.testing.assert_array_equal(own, expected)
        check_offsets(out.core)
        same(generate(prompt(20, seed), SIMILARITY, groups()), out)
        same(generate(prompt(20, seed), out.core, None), out)
    tokens = jnp.asarray([prompt(9, 5)])
    for c in (0, 2):
        empty = init_cache(OPT, 1, 9, jnp.dtype("float32"))
        found, _, _ = extend(ready.narrowed[c], tokens, empty, jnp.zeros(1, jnp.int32), observe_nothing)
        np.testing.assert_allclose(found, with_stand_ins(known(), ready.cores[c], tokens), rtol=5e-3, atol=5e-3)


def test_fused_sets_have_their_own_offsets() -> None:
    out = generate(LONG, FUSED, groups(FUSED))
    group = reference_group(LONG)
    for l, a in enumerate(activations(random_model(OPT), LONG)):
        votes = reference_votes(a, 0.4, "per_token").astype(np.float32)
        score = votes + np.float32(FUSED.group_tokens) * clusters().frequencies[group, l]
        np.testing.assert_array_equal(out.core.layers[l], top(score, a.sum(axis=0), KEPT))
    check_offsets(out.core)


@pytest.mark.parametrize("with_groups", [True, False])
def test_auto_has_them_both_ways(with_groups: bool) -> None:
    ready = groups(STEADY) if with_groups else None
    for tokens, method in ((LONG, "stability"), (SHORT, "similarity" if with_groups else "stability")):
        out = generate(tokens, STEADY, ready)
        assert out.stats.method == method
        own = [voted(a, KEPT) for a in activations(random_model(OPT), tokens)]
        expected = own if method == "stability" else frequent(reference_group(tokens))
        for kept, numbers in zip(out.core.layers, expected, strict=True):
            np.testing.assert_array_equal(kept, numbers)
        check_offsets(out.core)


@pytest.mark.parametrize("core", half_slow([STEADY, SIMILARITY, FUSED]), ids=lambda core: core.method)
def test_rows_of_a_batch_equal_their_single_runs(core: Chooser) -> None:
    batch = ci.generate(known(), [LONG, SHORT], core, groups=groups(core), max_new_tokens=9)
    if core is STEADY:
        assert batch.stats.method == "mixed"
    for row, tokens in enumerate((LONG, SHORT)):
        same(generate(tokens, core, groups(core)), batch, row)


@pytest.mark.parametrize("core", [SIMILARITY, FUSED, AUTO], ids=lambda core: core.method)
def test_a_keep_ratio_counts_them(core: Chooser) -> None:
    without = replace(core, linear=False)
    found, plain = (generate(LONG, own, groups(own), max_new_tokens=2) for own in (core, without))
    assert (found.stats.kept_neurons, plain.stats.kept_neurons) == ((KEPT,) * L, (F // 2,) * L)
    # They have two rows of D numbers, as this model's neurons do, and no bias.
    assert plain.stats.bytes_read_per_token - found.stats.bytes_read_per_token == 4 * L * 8
    # More than they are worth, and fewer than they cost.
    for ratio in (0.7, 0.08):
        ratios = {"gamma": ratio} if core is SIMILARITY else {"beta": ratio}
        other = replace(core, **ratios)
        assert not any(generate(LONG, other, groups(other), max_new_tokens=1).core.linear)


@pytest.mark.parametrize("core", half_slow([FUSED, SIMILARITY, STEADY]), ids=lambda core: core.method)
def test_without_them_all_is_as_without_a_calibration(core: Chooser) -> None:
    without = replace(core, linear=False)
    plain = ci.prepare_groups(random_model(OPT), clusters(), core, compacted=False)
    for tokens in (LONG, SHORT):
        found = generate(tokens, without, groups(without))
        expected = ci.generate(random_model(OPT), [tokens], core, groups=plain, max_new_tokens=9)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        assert found.core == expected.core
        assert found.stats.choices == expected.stats.choices


def test_with_all_neurons_the_model_is_dense() -> None:
    """Also where linear neurons would pay at any share."""
    core = replace(SIMILARITY, gamma=1.0)
    always = replace(known().calibration, linear=replace(known().calibration.linear, up_to=1.0))
    params = replace(known(), calibration=always)
    ready = ci.prepare_groups(params, clusters(), core, compacted=False)
    found = ci.generate(params, [SHORT], core, groups=ready, max_new_tokens=9)
    assert found.stats.kept_neurons == (F,) * L
    np.testing.assert_array_equal(found.tokens, generate(SHORT, None, None).tokens)


def test_published_lists_may_be_shorter_by_what_they_cost() -> None:
    listed = np.where(np.arange(F) < 45, F - np.arange(F, dtype=np.float32), 0)
    published = replace(clusters(), frequencies=np.tile(listed, (3, L, 1)), origin="published")
    ready = ci.prepare_groups(known(), published, SIMILARITY, compacted=False)
    np.testing.assert_array_equal(ready.sets[0].layers[1], np.arange(KEPT))
    message = refusal(lambda: ci.prepare_groups(known(), published, replace(SIMILARITY, gamma=0.6)))
    assert "asks for 49 of 96 neurons" in message
    most = float(message.rpartition("gamma=")[2])
    assert 0 <= 45 + 8 - most * F < 1e-4 * F
    assert ci.prepare_groups(known(), published, replace(SIMILARITY, gamma=most)).linear
    assert "has 45" in refusal(lambda: ci.prepare_groups(known(), published, replace(SIMILARITY, linear=False)))


def test_groups_without_them_serve_no_core_with_them() -> None:
    without = replace(SIMILARITY, linear=False)
    assert "without linear neurons" in refusal(lambda: generate(SHORT, SIMILARITY, groups(without)))
    assert "with linear neurons, but core asks for linear=False" in refusal(lambda: generate(SHORT, without, groups()))
    assert "linear=2" in refusal(lambda: replace(SIMILARITY, linear=2))


@pytest.mark.parametrize("core", half_slow([FUSED, SIMILARITY, STEADY]), ids=lambda core: core.method)
def test_models_whose_mlps_stay_on_the_host_have_them(core: Chooser) -> None:
    on_host = with_mlps_on_host(known())
    ready = ci.prepare_groups(on_host, clusters(), core, compacted=False)
    for rows in ([LONG], [SHORT, LONG]):
        found = ci.generate(on_host, rows, core, groups=ready, max_new_tokens=9)
        expected = ci.generate(known(), rows, core, groups=groups(core), max_new_tokens=9)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        check_same_core(found.core, expected.core)
        assert all(found.core.linear)


def test_groups_are_made_ready_for_a_plan_without_reading_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("no MLP is needed")

    monkeypatch.setattr("coreinfer_jax.sparsity.groups.layers_on_device", refuse)
    on_host = with_mlps_on_host(known())
    ready = ci.prepare_groups(on_host, clusters(), SIMILARITY, compacted=False)
    assert ready.linear
    assert SIMILARITY.to_narrow(on_host, ready, 1).linear == (True,) * L
    with pytest.raises(AssertionError, match="no MLP is needed"):
        ci.generate(on_host, [SHORT], SIMILARITY, groups=ready, max_new_tokens=2)
