"""Training of linear neurons: what it reads, and that a narrowed model then comes nearer to the full one."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.lab.evaluation import distilling
from coreinfer_jax.lab.evaluation.comparison import Excerpts
from coreinfer_jax.lab.evaluation.distilling import Lesson, distil, lesson
from coreinfer_jax.lab.evaluation.fitting import learn
from coreinfer_jax.lab.evaluation.measure import measure
from coreinfer_jax.lab.evaluation.sensitivity import linear_up_to
from coreinfer_jax.lab.evaluation.settings import without_prior
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.calibration import Calibration
from coreinfer_jax.text.corpus import Beginnings
from tests.support import MODELS, first_quick, random_model

CONTINUATION = 8


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short texts; optax relies on JAX's promotion, which the other tests forbid."""
    monkeypatch.setattr(distilling, "CONTINUATION", CONTINUATION)
    monkeypatch.setattr(distilling, "LEAST_PROMPT", 4)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def corpus(count: int = 32, length: int = 24) -> Beginnings:
    generator = np.random.default_rng(1)
    return Beginnings.of([generator.integers(3, 101, length).tolist() for _ in range(count)])


def fitted(name: str) -> tuple[Params, Calibration]:
    params = random_model(MODELS[name])
    prior, explained = learn(params, corpus())
    return params, Calibration(prior, None, None, replace(explained, up_to=1.0))


def lost(params: Params, known: Calibration, of: Lesson, keeps: tuple[float, ...]) -> np.ndarray:
    """Mean KL divergence at each keep ratio, as an evaluation measures it."""
    settings = [ci.CoreConfig(beta=keep, allocation="equal") for keep in keeps]
    rows = np.pad(of.rows, ((0, 0), (0, 1)))  # an evaluation asks for the token after the last, too
    prior = {without_prior(settings[0].ranking): known.prior}
    _, found = measure(replace(params, calibration=known), rows, of.prompts, settings, prior=prior)
    return np.array([own.kl.mean() for own in found])


@pytest.mark.parametrize("name", first_quick(["llama", "opt"]))
def test_training_brings_a_narrowed_model_nearer_to_the_full_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "RATE", 2e-2)
    params, known = fitted(name)
    of = lesson(corpus().texts(), [0] * 32, 0)
    # Fits of such small models are nearly the best there is: training is given spoiled ones.
    spoiled = tuple(replace(own, slopes=own.slopes / 2, constants=own.constants + 0.1) for own in known.linear.fits)
    fits, before = known.linear, replace(known.linear, fits=spoiled)
    known = replace(known, linear=before)
    kept = jax.tree.map(np.array, before)
    after = distil(replace(params, calibration=known), before, corpus(), of, 80, 0)
    jax.tree.map(np.testing.assert_array_equal, before, kept)  # what was given is as it was
    assert after.up_to == before.up_to
    keeps = (0.3, 0.5, 0.7)
    best, worst, trained = (lost(params, replace(known, linear=own), of, keeps) for own in (fits, before, after))
    assert (trained < (best + worst) / 2).all(), (best, worst, trained)


def test_no_steps_change_nothing_that_is_written() -> None:
    params, known = fitted("llama")
    of = lesson(corpus().texts(), [0] * 32, 0)
    after = distil(replace(params, calibration=known), known.linear, corpus(), of, 0, 0)
    for own, other in zip(after.fits, known.linear.fits, strict=True):
        # To the precision of 16 bits: directions are scaled anew.
        np.testing.assert_allclose(
            np.float32(own.directions).T @ np.float32(own.slopes),
            np.float32(other.directions).T @ np.float32(other.slopes),
            rtol=1e-2,
            atol=2e-3,
        )
        np.testing.assert_array_equal(own.constants, other.constants)
    for own, other in zip(after.prior, known.linear.prior, strict=True):
        np.testing.assert_allclose(own["squares"] / own["weight"], other["squares"] / other["weight"], rtol=2e-2)


def test_texts_are_cut_to_prompts_and_continuations() -> None:
    texts = [list(range(100, 140)), list(range(200, 207)), list(range(300, 304))]
    of = lesson(texts, [0, 5, 3], 0)
    assert of.rows.shape[1] == of.prompts.max() + CONTINUATION
    first = of.prompts[:-2]
    assert ((first >= 4) & (first <= CONTINUATION)).all()
    for i, (row, prompt, length) in enumerate(zip(of.rows[:-2], first, of.lengths, strict=False)):
        begins = 100 + 2 * CONTINUATION * i
        assert length == min(prompt + CONTINUATION, 140 - begins)
        assert row[:length].tolist() == list(range(begins, begins + length))
        assert not row[length:].any()
    assert of.rows[-2, :7].tolist() == list(range(200, 207))
    assert of.rows[-1, :4].tolist() == list(range(300, 304))
    assert [*of.prompts[-2:], *of.lengths[-2:]] == [5, 3, 7, 4]
    with pytest.raises(ci.CoreInferError, match="give longer"):
        lesson([[1, 2, 3]], [0], 0)


def test_linear_neurons_are_used_as_long_as_they_pay() -> None:
    params, known = fitted("opt")
    of = lesson(corpus().texts(), [0] * 32, 0)
    excerpts = Excerpts(np.pad(of.rows, ((0, 0), (0, 1))), of.prompts, 0)
    prior = {without_prior(ci.CoreConfig().ranking): known.prior}
    found = linear_up_to(params, known.linear, excerpts, prior)
    keeps = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
    pays = lost(params, known, of, keeps) < lost(params, replace(known, linear=None), of, keeps)
    expected = 0.0
    for keep, there in zip(keeps, pays, strict=True):
        if not there:
            break
        expected = keep
    assert found.up_to == expected
    useless = replace(known.linear, fits=tuple(replace(f, constants=f.constants + 10) for f in known.linear.fits))
    assert linear_up_to(params, useless, excerpts, prior).up_to == 0.0
