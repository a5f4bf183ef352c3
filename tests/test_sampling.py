"""Top-k and top-p against transformers' definitions, written out in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from coreinfer_jax.engine.prompts import make_sampling
from coreinfer_jax.engine.sampling import draw
from tests.support import OPT


def allowed(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> set[int]:
    order = np.argsort(-logits, kind="stable")[:top_k]
    p = np.exp((logits[order] - logits.max()) / temperature)
    before = np.cumsum(p / p.sum()) - p / p.sum()
    return set(order[before < (1.0 if top_p is None else top_p)].tolist())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 5, None), (1.0, None, 0.5), (0.7, 10, 0.8), (2.0, 1, None), (1.0, None, 1e-6), (1.0, 1000, 1.0)],
)
def test_draws_stay_inside_the_allowed_set_and_reach_all_of_it(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = np.random.default_rng(0).standard_normal(OPT.vocab_size).astype(np.float32) * 2
    sampling = make_sampling(OPT, temperature, top_k, top_p, (), 0)
    rows = jnp.broadcast_to(jnp.asarray(logits)[None, :], (20_000, OPT.vocab_size))
    drawn = np.asarray(draw(rows, sampling, jnp.int32(0)))
    expected = allowed(logits, temperature, top_k, top_p)
    assert set(drawn.tolist()) <= expected
    p = np.exp(logits[list(expected)] / temperature)
    p /= p.sum()
    counts = np.array([(drawn == i).sum() for i in expected])
    # Each count is binomial; five standard deviations over at most 101 tokens.
    assert (np.abs(counts - 20_000 * p) <= 5 * np.sqrt(20_000 * p * (1 - p)) + 1e-6).all()


def test_tokens_that_tie_at_the_cut_are_kept_together() -> None:
    logits = jnp.asarray([[3.0, 1.0, 1.0, 0.0] + [-9.0] * 97], jnp.float32)
    sampling = make_sampling(OPT, 1.0, 2, None, (), 0)
    rows = jnp.broadcast_to(logits, (2000, 101))
    assert set(np.asarray(draw(rows, sampling, jnp.int32(0))).tolist()) == {0, 1, 2}


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = jnp.zeros((3, OPT.vocab_size), jnp.float32)
    assert draw(logits, make_sampling(OPT, 0.0, None, None, (), None), jnp.int32(0)).tolist() == [0, 0, 0]
