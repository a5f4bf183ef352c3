"""Top-k and top-p against transformers' definitions, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreinfer_jax.engine.options import drawing_of
from coreinfer_jax.engine.sampling import Sampling, draw, make_sampling, with_keys
from tests.support import OPT


def settings(rows: int, **options: object) -> Sampling:
    return make_sampling(OPT, rows, drawing_of(options, OPT), 20)


def drawn_from(logits: jnp.ndarray, sampling: Sampling) -> np.ndarray:
    return np.asarray(draw(logits, sampling, jnp.zeros(len(logits), jnp.int32)))


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
    sampling = settings(20_000, temperature=temperature, top_k=top_k, top_p=top_p, key=0)
    rows = jnp.broadcast_to(jnp.asarray(logits)[None, :], (20_000, OPT.vocab_size))
    drawn = drawn_from(rows, sampling)
    expected = allowed(logits, temperature, top_k, top_p)
    assert set(drawn.tolist()) <= expected
    p = np.exp(logits[list(expected)] / temperature)
    p /= p.sum()
    counts = np.array([(drawn == i).sum() for i in expected])
    # Each count is binomial; five standard deviations over at most 101 tokens.
    assert (np.abs(counts - 20_000 * p) <= 5 * np.sqrt(20_000 * p * (1 - p)) + 1e-6).all()


@pytest.mark.parametrize("top_p", [1e-300, 1e-46, 1e-40, 1e-9])
def test_a_top_p_that_float32_cannot_hold_draws_the_most_probable_token(top_p: float) -> None:
    logits = jnp.asarray(np.random.default_rng(3).standard_normal((50, OPT.vocab_size)), jnp.float32)
    drawn = drawn_from(logits, settings(50, temperature=1.0, top_p=top_p, key=0))
    assert (drawn == np.argmax(logits, axis=-1)).all()


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e30])
@pytest.mark.parametrize("options", [{}, {"top_p": 1 - 1e-12}, {"min_p": 1e-46}, {"min_p": 1}])
def test_every_accepted_setting_draws_a_token_that_may_be_drawn(temperature: float, options: dict[str, float]) -> None:
    logits = np.full((200, OPT.vocab_size), -np.inf, np.float32)
    logits[:, 7], logits[:, 9] = 3.0, 2.0
    drawn = drawn_from(jnp.asarray(logits), settings(200, temperature=temperature, key=0, **options))
    assert set(drawn.tolist()) <= {7, 9}


def test_every_seed_is_a_stream_of_its_own() -> None:
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 7, 2**63 - 1, -1, -2, -(2**32), -(2**63)]
    keys = [drawing_of({"temperature": 1.0, "key": seed}, OPT).key for seed in seeds]
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == len(seeds)
    for seed, key in zip(seeds[:4], keys, strict=False):
        assert (jax.random.key_data(key) == jax.random.key_data(jax.random.key(np.uint32(seed)))).all()


def test_tokens_that_tie_at_the_cut_are_kept_together() -> None:
    logits = jnp.asarray([[3.0, 1.0, 1.0, 0.0] + [-9.0] * 97], jnp.float32)
    sampling = settings(2000, temperature=1.0, top_k=2, key=0)
    rows = jnp.broadcast_to(logits, (2000, 101))
    assert set(drawn_from(rows, sampling).tolist()) == {0, 1, 2}


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = jnp.zeros((3, OPT.vocab_size), jnp.float32)
    assert drawn_from(logits, settings(3)).tolist() == [0, 0, 0]


def test_rows_draw_by_their_own_settings() -> None:
    """A greedy row, one without cuts and one with, together in one program, draw what each draws alone."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.standard_normal((3, OPT.vocab_size)) * 2, jnp.float32)
    own = [
        with_keys(settings(1)),
        settings(1, temperature=1.3, key=5),
        settings(1, temperature=0.7, top_k=4, top_p=0.8, key=6, eos_ids=(3,)),
    ]
    together = jax.tree.map(lambda *rows: jnp.concatenate(rows), *own)
    for step in range(20):
        steps = jnp.asarray([step, step + 1, step + 2], jnp.int32)
        alone = [int(draw(logits[b : b + 1], own[b], steps[b : b + 1])[0]) for b in range(3)]
        assert draw(logits, together, steps).tolist() == alone
