"""Linear neurons against plain NumPy: fits, what they leave, what they write, and how generation uses them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.loop import begin
from coreinfer_jax.engine.running import advance, insert_request, start
from coreinfer_jax.io.calibration_file import CALIBRATION, read_calibration, write_calibration
from coreinfer_jax.lab.evaluation import fitting
from coreinfer_jax.lab.evaluation.fitting import Products, directions_of, fit, learn
from coreinfer_jax.lab.evaluation.measure import collect, measure
from coreinfer_jax.model import extend, observe_nothing
from coreinfer_jax.model.cache import init_cache
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.calibration import Calibration
from coreinfer_jax.sparsity.linear import LinearFit
from coreinfer_jax.sparsity.narrow import gather_core
from coreinfer_jax.sparsity.rules import Contribution
from coreinfer_jax.text.corpus import Beginnings
from tests.support import LLAMA, MODELS, OPT, check_same_core, first_quick, half_slow, random_model

D, F = OPT.hidden_size, OPT.mlp_size
CORE = ci.CoreConfig(beta=0.5, allocation="equal")


def corpus(count: int = 24, length: int = 40) -> Beginnings:
    generator = np.random.default_rng(1)
    lengths = generator.integers(length // 2, length + 1, count)
    return Beginnings.of([generator.integers(3, 101, n).tolist() for n in lengths])


def explained(params: Params, texts: Beginnings | None = None) -> Params:
    """`params` with linear neurons learnt from random texts."""
    prior, known = learn(params, corpus() if texts is None else texts)
    assert known is not None
    return replace(params, calibration=Calibration(prior, None, None, known))


@jax.jit
def passes(params: Params, rows: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """Of each layer, what its MLP reads [B, T, D] and its activations [B, T, F]."""
    empty = init_cache(params.config, *rows.shape, jnp.dtype("float32"))
    start = jnp.zeros(len(rows), jnp.int32)
    _, _, seen = extend(params, rows, empty, start, lambda l, layer, own: (own.inputs, own.activations))
    inputs, activations = zip(*seen, strict=True)
    return list(inputs), list(activations)


def tokens_of(params: Params, texts: Beginnings) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each layer, x [n, D] and a [n, F] of all tokens of texts, in float64."""
    inputs, activations = passes(params.weights, jnp.asarray(texts.rows))
    counted = np.arange(texts.rows.shape[1])[None, :] < texts.lengths[:, None]
    return [
        (np.asarray(x, np.float64)[counted], np.asarray(a, np.float64)[counted])
        for x, a in zip(inputs, activations, strict=True)
    ]


def token_weights(a: np.ndarray, down: np.ndarray) -> np.ndarray:
    return 1 / ((a * np.linalg.norm(down, axis=0)) ** 2).sum(axis=1)


def random_products(tokens: int = 200, seed: int = 0) -> tuple[Products, np.ndarray, np.ndarray, np.ndarray]:
    """Sums over random tokens; their inputs, activations and weights."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(tokens, 12)) @ generator.normal(size=(12, 12)) + generator.normal(size=12)
    a = np.maximum(x @ generator.normal(size=(12, 20)), 0)
    w = generator.uniform(0.1, 3, tokens)
    sums = w.sum(), w @ x, w @ a, (x * w[:, None]).T @ x, (x * w[:, None]).T @ a
    return Products(*(jnp.asarray(array, jnp.float32) for array in sums)), x, a, w


def regression(x: np.ndarray, a: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes [D, F] and constants [F] of the weighted least squares with a ridge, from its definition."""
    mean = w @ x / w.sum()
    ridge = fitting.RIDGE * np.trace((x - mean).T @ ((x - mean) * w[:, None])) / w.sum() / x.shape[1]
    root = np.sqrt(w / w.sum())[:, None]
    centred, targets = (x - mean) * root, (a - w @ a / w.sum()) * root
    rows = np.concatenate([centred, np.sqrt(ridge) * np.eye(x.shape[1])])
    slopes = np.linalg.lstsq(rows, np.concatenate([targets, np.zeros((x.shape[1], a.shape[1]))]), rcond=None)[0]
    return slopes, w @ a / w.sum() - mean @ slopes


def test_with_all_directions_the_fit_is_the_whole_regression() -> None:
    products, x, a, w = random_products()
    down = np.random.default_rng(1).normal(size=(12, 20)).astype(np.float32)
    found = fit(products, down, np.ones((2, 20), bool), 12)
    slopes, constants = regression(x, a, w)
    expected = x @ slopes + constants
    np.testing.assert_allclose(found.expected(jnp.asarray(x[None], jnp.float32))[0], expected, rtol=5e-3, atol=2e-2)
    np.testing.assert_allclose(found.written, down @ np.asarray(found.slopes, np.float64).T, rtol=2e-3, atol=2e-3)


def test_directions_are_the_best_for_what_is_left_out() -> None:
    """Eckart and Young: of all maps of rank r, in inputs of variance 1, the singular vectors leave the least."""
    products, x, a, w = random_products()
    down = np.random.default_rng(1).normal(size=(12, 20)).astype(np.float32)
    dropped = np.arange(20)[None, :] >= 7
    found = fit(products, down, dropped, 4)
    mean = w @ x / w.sum()
    covariance = (x - mean).T @ ((x - mean) * w[:, None]) / w.sum()
    ridge = fitting.RIDGE * np.trace(covariance) / 12
    values, vectors = np.linalg.eigh(covariance + ridge * np.eye(12))
    root = (vectors * np.sqrt(values)) @ vectors.T
    slopes, _ = regression(x, a, w)
    whole = root @ slopes[:, 7:] @ down[:, 7:].T
    own = root @ np.asarray(found.directions, np.float64).T @ np.asarray(found.slopes, np.float64)[:, 7:]
    left = np.linalg.norm(whole - own @ down[:, 7:].T)
    least = np.sqrt((np.linalg.svd(whole, compute_uv=False)[4:] ** 2).sum())
    assert 0 < least <= left <= 1.001 * least


@pytest.mark.parametrize("name", first_quick(["llama", "opt"]))
def test_fits_of_a_model_are_those_of_all_its_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params, texts = random_model(MODELS[name]), corpus()
    monkeypatch.setattr(fitting, "directions_of", lambda config: config.hidden_size)
    known = explained(params, texts).calibration.linear
    for layer, found, (x, a) in zip(params.layers, known.fits, tokens_of(params, texts), strict=True):
        slopes, constants = regression(x, a, token_weights(a, np.asarray(layer.mlp.down.weight, np.float64)))
        expected = found.expected(jnp.asarray(x[None], jnp.float32))[0]
        np.testing.assert_allclose(expected, x @ slopes + constants, rtol=1e-2, atol=1e-2 * np.abs(a).max())


def test_reading_in_parts_is_reading_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    params, texts = random_model(LLAMA), corpus()
    at_once = explained(params, texts).calibration.linear
    monkeypatch.setattr("coreinfer_jax.lab.evaluation.measure.BATCH_TOKENS", 80)
    monkeypatch.setattr(fitting, "MOST_BYTES", 1)
    in_parts = explained(params, texts).calibration.linear
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, D)), jnp.float32)
    for one, other in zip(at_once.fits, in_parts.fits, strict=True):
        np.testing.assert_allclose(one.expected(x), other.expected(x), rtol=2e-2, atol=2e-3)
    for one, other in zip(at_once.prior, in_parts.prior, strict=True):
        np.testing.assert_allclose(one["squares"], other["squares"], rtol=2e-2)


def test_unexplained_sums_are_those_of_numpy() -> None:
    params, texts = explained(random_model(OPT)), corpus()
    known = params.calibration.linear
    pairs = zip(params.layers, known.fits, known.prior, tokens_of(params, texts), strict=True)
    for layer, own, sums, (x, a) in pairs:
        weights = token_weights(a, np.asarray(layer.mlp.down.weight, np.float64))
        directions, slopes = (np.asarray(one, np.float64) for one in (own.directions, own.slopes))
        left = a - x @ directions.T @ slopes - np.asarray(own.constants, np.float64)
        assert sums["tokens"] == len(a)
        np.testing.assert_allclose(sums["weight"], weights.sum(), rtol=1e-4)
        np.testing.assert_allclose(sums["squares"], weights @ left**2, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(sums["total"], weights @ left, rtol=1e-2, atol=1e-3 * weights.sum())
        assert (weights @ left**2).sum() < (weights @ (a - weights @ a / weights.sum()) ** 2).sum()


def test_what_is_left_to_write_is_what_those_left_out_write() -> None:
    generator = np.random.default_rng(0)
    down, slopes = generator.normal(size=(D, F)), generator.normal(size=(5, F))
    own = LinearFit(
        directions=jnp.zeros((5, D)),
        slopes=jnp.asarray(slopes, jnp.float32),
        constants=jnp.zeros(F),
        written=jnp.asarray(down @ slopes.T, jnp.float32),
    )
    kept = np.sort(generator.choice(F, 30, replace=False))
    others = np.setdiff1d(np.arange(F), kept)
    found = own.left_to_write(jnp.asarray(down[:, kept], jnp.float32), jnp.asarray(kept), size=5)
    np.testing.assert_allclose(found, down[:, others] @ slopes[:, others].T, rtol=1e-4, atol=1e-4)


def with_stand_ins(params: Params, core: ci.CoreNeurons, tokens: jax.Array) -> np.ndarray:
    """Hidden states [B, T, E] of the full model, whose neurons outside of a set stand where their fits expect them."""
    kept = [np.isin(np.arange(F), own) for own in core.layers]
    fits = params.calibration.linear.fits
    layers = []
    for layer, offset in zip(params.layers, core.offsets, strict=True):
        layers.append(replace(layer, mlp=replace(layer.mlp, down=layer.mlp.down.shifted(jnp.asarray(offset)))))

    def edit(l, layer, seen):
        # The constants are in the offsets.
        stands = fits[l].expected(seen.inputs) - fits[l].constants[None, None, :]
        return jnp.where(kept[l][None, None, :], seen.activations, stands)

    changed = replace(params.weights, layers=tuple(layers))
    empty = init_cache(params.config, *tokens.shape, jnp.dtype("float32"))
    hidden, _, _ = extend(changed, tokens, empty, jnp.zeros(len(tokens), jnp.int32), observe_nothing, edit)
    return np.asarray(hidden)


@pytest.mark.parametrize("name", half_slow(MODELS))
def test_narrowed_weights_compute_what_masks_and_fits_do(name: str) -> None:
    params = explained(random_model(MODELS[name]))
    prompts = np.random.default_rng(2).integers(3, 101, (2, 20))
    core = ci.generate(params, prompts, CORE, max_new_tokens=1).core
    assert core.linear == (True, True, True)
    tokens = jnp.asarray(np.random.default_rng(3).integers(3, 101, (2, 9)), jnp.int32)
    narrowed = ci.compact(params, core)
    empty = init_cache(params.config, 2, 9, jnp.dtype("float32"))
    found, _, _ = extend(narrowed, tokens, empty, jnp.zeros(2, jnp.int32), observe_nothing)
    for row in range(2):
        expected = with_stand_ins(params, core.row(row), tokens[row : row + 1])
        np.testing.assert_allclose(found[row], expected[0], rtol=5e-3, atol=5e-3)


def test_padding_to_a_multiple_changes_nothing() -> None:
    params = explained(random_model(LLAMA))
    mlps = [layer.mlp for layer in params.layers]
    indices = [jnp.arange(10, dtype=jnp.int32)] * 3
    arguments = mlps, indices, [None] * 3, list(params.calibration.linear.fits)
    plain, padded = (gather_core(*arguments, multiple=multiple) for multiple in (1, 32))
    assert [plain[0].down.weight.shape, padded[0].down.weight.shape] == [(D, 10 + 8), (D, 32 + 32)]
    params_of = [
        replace(params.weights, layers=tuple(map(lambda own, mlp: replace(own, mlp=mlp), params.layers, found)))
        for found in (plain, padded)
    ]
    one, other = (ci.forward(own, [[5, 9, 30]]) for own in params_of)
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_keep_ratio_counts_them() -> None:
    for name in ("opt", "llama"):
        params = explained(random_model(MODELS[name]))
        size = directions_of(params.config)
        assert size == 8
        prompt = [list(range(3, 30))]
        with_them, without = (
            ci.generate(params, prompt, replace(CORE, linear=linear), max_new_tokens=2) for linear in (True, False)
        )
        worth = {"opt": 8, "llama": 6}[name]  # two rows of D numbers each, to two or three of another neuron
        assert with_them.stats.kept_neurons == tuple(kept - worth for kept in without.stats.kept_neurons)
        # At most a neuron's bytes fewer per layer, and never more.
        gap = without.stats.bytes_read_per_token - with_them.stats.bytes_read_per_token
        assert 0 <= gap < 3 * 3 * D * 4


def test_without_them_all_is_as_before() -> None:
    params = explained(random_model(LLAMA))
    before = replace(params, calibration=replace(params.calibration, linear=None))
    prompt = [list(range(3, 40))]
    expected = ci.generate(before, prompt, CORE, max_new_tokens=8)
    found = ci.generate(params, prompt, replace(CORE, linear=False), max_new_tokens=8)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert found.core == expected.core
    assert not any(found.core.linear)
    # Rules without a prior know nothing of texts.
    votes = ci.generate(params, prompt, replace(CORE, rule="votes"), max_new_tokens=1)
    assert not any(votes.core.linear)


def test_with_all_neurons_the_model_is_dense() -> None:
    params = explained(random_model(LLAMA))
    prompt = [list(range(3, 40))]
    found = ci.generate(params, prompt, replace(CORE, beta=1.0), max_new_tokens=8)
    np.testing.assert_array_equal(found.tokens, ci.generate(params, prompt, None, max_new_tokens=8).tokens)
    assert found.stats.kept_neurons == (F,) * 3


def test_evaluation_gives_the_numbers_of_decoding() -> None:
    params = explained(random_model(LLAMA))
    rows = np.random.default_rng(4).integers(3, 101, (2, 12 + 9)).astype(np.int32)
    prior = {Contribution(prior_tokens=0.0): params.calibration.prior}
    _, (found,) = measure(params, rows, 12, [CORE], prior=prior)
    full = np.asarray(jax.nn.log_softmax(ci.forward(params, rows[:, :-1])), np.float64)[:, 12:]
    for row in range(2):
        prompt = rows[row : row + 1, :12]
        core = ci.generate(params, prompt, CORE, max_new_tokens=1).core
        shared = core.row(0)
        cache = init_cache(params.config, 1, rows.shape[1], jnp.dtype("float32"))
        zero = jnp.zeros(1, jnp.int32)
        _, cache, _ = extend(params.weights, jnp.asarray(prompt), cache, zero, observe_nothing)
        rest = jnp.asarray(rows[row : row + 1, 12:-1])
        hidden, _, _ = extend(ci.compact(params, shared), rest, cache, zero + 12, observe_nothing)
        narrowed = np.asarray(jax.nn.log_softmax(hidden @ params.unembedding.T), np.float64)[0]
        kl = (np.exp(full[row]) * (full[row] - narrowed)).sum(axis=-1)
        np.testing.assert_allclose(found.kl[row], kl, rtol=2e-2, atol=1e-4)


def test_turns_of_a_conversation_add_up() -> None:
    params = explained(random_model(LLAMA))
    first, second = list(range(10, 30)), list(range(40, 60))
    chunks = list(ci.converse(params, first, None, CORE, max_new_tokens=4))
    reply, past = np.concatenate([chunk.tokens[0] for chunk, _ in chunks]).tolist(), chunks[-1][1]
    tokens = first + reply + second
    *_, (last, _) = ci.converse(params, tokens, past, CORE, max_new_tokens=4)
    fresh = ci.generate(params, [tokens], CORE, max_new_tokens=4)
    check_same_core(last.core, fresh.core)
    assert last.core.linear == (True, True, True)


@pytest.mark.parametrize("name", first_quick(["llama", "opt"]))
def test_requests_put_into_rows_say_what_they_say_alone(name: str) -> None:
    params = explained(random_model(replace(MODELS[name], eos_ids=())))
    running = start(params, 2, 64, CORE.widths(params), CORE.linear_layers(params))
    prompts = [list(range(5, 25)), list(range(60, 70))]
    said = []
    for row, prompt in enumerate(prompts):
        begun = begin(make_request(params, [prompt], CORE, {"max_new_tokens": 9}))
        said.append([int(begun.rows.token[0])])
        running = insert_request(running, row, begun)
    _, tokens, lengths = advance(running, 8)
    for row, prompt in enumerate(prompts):
        alone = ci.generate(params, [prompt], CORE, max_new_tokens=9)
        assert said[row] + tokens[row, : lengths[row]].tolist() == alone.tokens[0].tolist()
    other = start(params, 2, 64, CORE.widths(params))
    begun = begin(make_request(params, [prompts[0]], CORE, {"max_new_tokens": 9}))
    with pytest.raises(ci.CoreInferError, match=r"linear neurons in layers \[0, 1, 2\], the state in \[\]"):
        insert_request(other, 0, begun)


def test_one_set_for_all_rows_and_16_bit_weights_run() -> None:
    params = explained(random_model(LLAMA, dtype="bfloat16"))
    prompts = np.random.default_rng(2).integers(3, 101, (3, 20))
    out = ci.generate(params, prompts, replace(CORE, per_row=False), max_new_tokens=5)
    assert out.core.rows is None
    assert all(out.core.linear)
    narrowed = ci.compact(params, out.core).layers[0].mlp
    assert narrowed.linear.weight.dtype == narrowed.down.weight.dtype == jnp.bfloat16


def test_a_calibration_file_holds_them(tmp_path) -> None:
    params = explained(random_model(LLAMA))
    tried = replace(params.calibration.linear, up_to=0.8)
    found = replace(params.calibration, gains=np.zeros((3, 64), np.float32), core=CORE, linear=tried)
    write_calibration(tmp_path, LLAMA, "model", found, {})
    again = read_calibration(tmp_path, LLAMA, lambda: "model")
    assert again.core == CORE
    assert again.linear.up_to == 0.8
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    (tmp_path / CALIBRATION).unlink()
    write_calibration(tmp_path, LLAMA, "model", replace(found, linear=None), {})
    assert read_calibration(tmp_path, LLAMA, lambda: "model").linear is None


def test_what_a_model_does_not_have_is_not_asked_of_it() -> None:
    params = random_model(LLAMA)
    core = ci.CoreNeurons([range(5, 60)] * 3, linear=True)
    calls = (
        ci.compact,
        lambda params, core: ci.generate(params, [[3, 4]], core),
        lambda params, core: ci.forward(params, [[3]], core),
    )
    for call in calls:
        with pytest.raises(ci.CoreInferError, match="linear ones of a calibration, and params have none"):
            call(params, core)
    with pytest.raises(ci.CoreInferError, match="linear ones of a calibration, and params have none"):
        start(params, 2, 64, (40, 40, 40), (True, True, True))
    with pytest.raises(ci.CoreInferError, match="linear='yes'"):
        ci.CoreNeurons([range(5, 60)] * 3, linear="yes")
    assert core != ci.CoreNeurons(core.layers)
    assert core.row(0) == core
    for wrong in ([True], [True, True, 1]):
        with pytest.raises(ci.CoreInferError, match=r"linear=\[True"):
            ci.CoreNeurons([range(5, 60)] * 3, linear=wrong)
    some = ci.CoreNeurons([None, range(5), range(6)], linear=True)
    assert some.linear == (False, True, True)
    with pytest.raises(ci.CoreInferError, match="False for dense ones"):
        ci.CoreNeurons([None, range(5)], linear=[True, False])


@pytest.mark.parametrize(
    ("sizes", "expected"), [((1536, 576), 128), ((14336, 4096), 256), ((96, 32), 8), ((8, 4), 1), ((4000, 100), 50)]
)
def test_how_many_a_layer_has(sizes: tuple[int, int], expected: int) -> None:
    assert directions_of(replace(LLAMA, mlp_size=sizes[0], hidden_size=sizes[1])) == expected


def test_each_layer_has_them_where_they_pay() -> None:
    """Not where it keeps more than the largest share, nor where it has fewer neurons than they cost."""
    params = explained(random_model(LLAMA))
    gains = np.zeros((3, 64), np.float32)
    gains[0, :48], gains[1:, :21] = 2, 1  # 48, 21 and 21 64ths of 96 neurons
    known = replace(params, calibration=replace(params.calibration, gains=gains))
    core = ci.CoreConfig(beta=0.4751)
    assert core.linear_layers(known) == (False, True, True)
    assert core.widths(known) == (72, 31 - 6, 31 - 6)
    few = ci.CoreConfig(beta=0.05)
    assert (few.linear_layers(known), few.widths(known)) == ((True, False, False), (9 - 6, 1, 1))
    out = ci.generate(known, [list(range(3, 40))], core, max_new_tokens=3)
    assert out.core.linear == (False, True, True)
    assert [layer.mlp.linear is None for layer in ci.compact(known, out.core).layers] == [True, False, False]
    without = ci.generate(known, [list(range(3, 40))], replace(core, linear=False), max_new_tokens=3)
    # At most a neuron less in each of the two layers: what linear ones cost is rounded up.
    assert 0 <= without.stats.bytes_read_per_token - out.stats.bytes_read_per_token < 2 * 3 * D * 4
    np.testing.assert_array_equal(out.core.layers[0], without.core.layers[0])  # ranked as without
    rows = np.random.default_rng(4).integers(3, 101, (2, 21)).astype(np.int32)
    prior = {Contribution(prior_tokens=0.0): known.calibration.prior}
    _, (found, plain) = measure(known, rows, 12, [core, replace(core, linear=False)], prior=prior)
    assert np.abs(found.kl - plain.kl).max() > 1e-6


def test_no_layer_falls_far_below_the_mean_where_it_could_have_them() -> None:
    params = explained(random_model(LLAMA))
    gains = np.zeros((3, 64), np.float32)
    gains[0] = 1
    known = replace(params, calibration=replace(params.calibration, gains=gains))
    core = ci.CoreConfig(beta=0.5)
    assert replace(core, linear=False).widths(known) == (96, 46, 1)
    # 0.7 of 32 64ths is 22 for each.
    assert core.widths(known) == (78, 33 - 6, 33 - 6)


def test_a_prior_of_other_texts_leaves_them_out() -> None:
    params = explained(random_model(LLAMA))
    rows = np.random.default_rng(4).integers(3, 101, (2, 21)).astype(np.int32)
    other = collect(params, corpus(6, 30), [Contribution()])
    _, (found, plain) = measure(params, rows, 12, [CORE, replace(CORE, linear=False)], prior=other)
    np.testing.assert_array_equal(found.kl, plain.kl)


def test_few_tokens_give_no_fit() -> None:
    prior, known = learn(random_model(LLAMA), corpus(3, 20))
    assert known is None
    assert prior[0]["tokens"] > 0


@pytest.mark.parametrize("size", [1e-6, 1e5])
def test_large_and_small_activations_fit_into_16_bits(size: float) -> None:
    products, x, a, w = random_products()
    scaled = replace(products, activations=products.activations * size, mixed=products.mixed * size)
    down = np.random.default_rng(1).normal(size=(12, 20)).astype(np.float32) / size
    found = fit(scaled, down, np.ones((2, 20), bool), 12)
    slopes, constants = regression(x, a, w)
    expected = (x @ slopes + constants) * size
    np.testing.assert_allclose(
        found.expected(jnp.asarray(x[None], jnp.float32))[0], expected, rtol=5e-3, atol=2e-2 * size
    )
    with pytest.raises(ci.CoreInferError, match="too large for linear neurons"):
        fit(replace(products, mixed=products.mixed * 1e12), down, np.ones((2, 20), bool), 12)
