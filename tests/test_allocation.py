"""How a keep ratio is shared out over the layers, against handing neurons out one part at a time."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.lab.evaluation.measure import collect, measure
from coreinfer_jax.lab.evaluation.sensitivity import SHARES, layer_gains
from coreinfer_jax.lab.evaluation.settings import kept_by, prior_of
from coreinfer_jax.model.cache import cache_bytes
from coreinfer_jax.sparsity.allocate import PARTS, allocate
from coreinfer_jax.sparsity.calibration import Calibration
from coreinfer_jax.sparsity.rules import Contribution
from coreinfer_jax.text.corpus import Beginnings
from tests.support import MODELS, OPT, random_model

CONTEXT = 11


def falling(rng, layers):
    """Gains that never rise along a layer, of very different sizes from layer to layer."""
    return -np.sort(-rng.random((layers, PARTS)) * 10.0 ** rng.uniform(-3, 1, (layers, 1)), axis=1)


def handed_out(gains, parts, first=1):
    """So many parts to each layer, then each further one to the layer whose next part is worth most."""
    own = np.full(len(gains), first)
    for _ in range(parts - own.sum()):
        own[np.argmax([layer[n] if n < PARTS else -np.inf for layer, n in zip(gains, own, strict=True)])] += 1
    return own


@pytest.mark.parametrize("F", [64, 96, 768, 11008])
@pytest.mark.parametrize("beta", [0.05, 0.2, 0.4, 0.7, 0.99, 1.0])
def test_each_part_goes_where_it_is_worth_most(beta, F):
    config = replace(OPT, num_layers=7, mlp_size=F)
    gains = falling(np.random.default_rng(F), 7)
    kept = int(beta * F + 1e-9)
    expected = handed_out(gains, 7 * kept * PARTS // F) * F // PARTS
    found = allocate(ci.CoreConfig(beta=beta), config, gains)
    assert found == (tuple(expected) if 7 * kept * PARTS // F >= 7 else (kept,) * 7)
    assert 7 * kept - F / PARTS - 7 < sum(found) <= 7 * kept


@pytest.mark.parametrize("beta", [0.05, 0.4, 0.7, 1.0])
def test_each_layer_gets_the_least_share_first(beta):
    config = replace(OPT, num_layers=7, mlp_size=640)
    gains = falling(np.random.default_rng(1), 7)
    kept = int(beta * 640 + 1e-9)
    first = max(1, int(0.7 * kept / 10))
    found = allocate(ci.CoreConfig(beta=beta), config, gains, least=0.7)
    assert found == tuple(handed_out(gains, 7 * kept * PARTS // 640, first) * 10)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("F", [1, 10, 48, 64, 100, 768])
@pytest.mark.parametrize("beta", [0.001, 0.01, 0.1, 0.5, 0.9])
def test_every_layer_keeps_some_and_all_together_no_more_than_alike(beta, F, known):
    for layers in (1, 2, 3, 24):
        config = replace(OPT, num_layers=layers, mlp_size=F)
        gains = falling(np.random.default_rng(F), layers) if known else None
        found = allocate(ci.CoreConfig(beta=beta), config, gains)
        assert min(found) >= 1
        assert max(found) <= F
        assert sum(found) <= layers * max(1, int(beta * F + 1e-9))


def test_layers_that_are_not_narrowed_take_no_part():
    config = replace(OPT, num_layers=4, mlp_size=640)
    gains = falling(np.random.default_rng(0), 4)
    found = allocate(ci.CoreConfig(beta=0.3, layers=(0.5, 1.0)), config, gains)
    assert found[:2] == (640, 640)
    assert found[2:] == tuple(handed_out(gains[2:], 2 * 192 * PARTS // 640) * 10)


def test_too_few_parts_for_all_layers_are_shared_alike():
    config = replace(OPT, num_layers=4, mlp_size=1280)
    assert allocate(ci.CoreConfig(beta=0.01), config, falling(np.random.default_rng(0), 4)) == (12,) * 4


UNKNOWN = [
    # 0.2 + 0.6 * 0.8 of the first layer's 100.
    (8, 0.2, (68, 13, 13, 13, 13, 13, 13, 13)),
    # Two thirds of all are less: of 3 * 20, of 2 * 40.
    (3, 0.2, (40, 10, 10)),
    (2, 0.4, (53, 27)),
    (1, 0.4, (40,)),
    (4, 1.0, (100, 100, 100, 100)),
]


@pytest.mark.parametrize(("layers", "beta", "expected"), UNKNOWN)
def test_without_a_calibration_the_first_layer_keeps_more(layers, beta, expected):
    config = replace(OPT, num_layers=layers, mlp_size=100)
    assert allocate(ci.CoreConfig(beta=beta), config, None) == expected


def test_the_first_layer_keeps_more_only_where_it_is_narrowed():
    config = replace(OPT, num_layers=4, mlp_size=100)
    assert allocate(ci.CoreConfig(beta=0.2, layers=(0.5, 1.0)), config, None) == (100, 100, 20, 20)


@pytest.mark.parametrize("core", [ci.CoreConfig(beta=0.2, allocation="equal"), ci.CoreConfig.paper()])
def test_equal_is_equal_whatever_is_known(core):
    assert allocate(core, OPT, falling(np.random.default_rng(0), OPT.num_layers)) == (19, 19, 19)


def test_an_unknown_allocation_is_refused():
    with pytest.raises(ci.CoreInferError, match="allocation='best': give 'sensitivity', 'equal'"):
        ci.CoreConfig(allocation="best")


@pytest.fixture(scope="module")
def texts():
    return np.random.default_rng(1).integers(3, OPT.vocab_size, (3, CONTEXT + 7)).astype(np.int32)


def sums_of(params, texts):
    """What a calibration knows of the texts: the sums of every layer."""
    rows = Beginnings(texts, np.full(len(texts), texts.shape[1], np.int32))
    [sums] = collect(params, rows, [Contribution()]).values()
    return sums


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_gains_are_slopes_below_the_divergence_of_each_layer_alone(name, texts):
    params = random_model(MODELS[name])
    prior = prior_of(Calibration(sums_of(params, texts), None, None))
    gains = layer_gains(params, texts, CONTEXT, prior)
    L = params.config.num_layers
    assert gains.shape == (L, PARTS)
    assert (np.diff(gains, axis=1) <= 0).all()
    for l in range(L):
        layers = (l / L, (l + 1) / L)
        alone = [ci.CoreConfig(beta=share, layers=layers, allocation="equal") for share in SHARES]
        _, measured = measure(params, texts, CONTEXT, alone, prior=prior)
        kl = np.array([one.kl.mean() for one in measured])
        below = np.interp(SHARES, np.arange(PARTS + 1) / PARTS, gains[l].sum() - np.append(0, np.cumsum(gains[l])))
        assert (below <= kl * 1.02 + 1e-6).all()
        if (np.diff(np.log(kl)) < 0).all() and (np.diff(np.diff(np.log(kl)) / np.diff(SHARES)) >= 0).all():
            np.testing.assert_allclose(below, kl, rtol=0.05)  # a convex curve is met


@pytest.mark.parametrize("allocation", ["sensitivity", "equal"])
def test_evaluation_and_generation_keep_the_same_numbers(allocation, texts):
    params = random_model(OPT)
    gains = falling(np.random.default_rng(3), OPT.num_layers)
    known = replace(params, calibration=Calibration(sums_of(params, texts), gains, None))
    core = ci.CoreConfig(beta=0.3, allocation=allocation)
    out = ci.generate(known, [texts[0]], core, max_new_tokens=2)
    assert out.stats.kept_neurons == allocate(core, OPT, gains)
    assert tuple(kept_by(core, known)) == out.stats.kept_neurons
    moved = ci.generate(jax.device_put(known), [texts[0]], core, max_new_tokens=2)
    assert moved.core == out.core


@pytest.mark.parametrize("rows", [1, 2])
def test_a_layer_that_keeps_all_is_read_as_it_is(rows, texts):
    params = random_model(OPT)
    # 3 * 57 neurons are 114 parts of 1.5: 64 for the first layer, one for the last, 49 are left for the second.
    gains = np.repeat(np.float32([[9.0], [2.0], [1.0]]), PARTS, axis=1)
    known = replace(params, calibration=Calibration(sums_of(params, texts), gains, None))
    core, prompts = ci.CoreConfig(beta=0.6), [row[:9].tolist() for row in texts[:rows]]
    request = make_request(known, prompts, core, {"max_new_tokens": 4})
    out = ci.generate(known, prompts, core, max_new_tokens=4)
    assert out.stats.kept_neurons == (96, 73, 1)
    assert out.core.layers[0] is None
    assert out.core.offsets[0] is None
    for row in range(rows):
        alone = ci.generate(known, [prompts[row]], core, max_new_tokens=4)
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[row])
    narrowed = ci.compact(known, out.core)
    held = [m.weight.nbytes for layer in narrowed.layers[1:] for m in (layer.mlp.up, layer.mlp.down)]
    assert request.added_bytes == cache_bytes(OPT, rows, request.capacity, known.dtype) + sum(held)
