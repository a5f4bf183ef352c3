"""The drafters that benchmarks compare, and what is held elsewhere by transformers with accelerate."""

from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from benchmarks import lossless
from benchmarks.contenders import drafters
from benchmarks.contenders.drafters import Drafter
from benchmarks.contenders.trial import Continued
from coreinfer_jax.model import extend, observe_nothing, unembed
from coreinfer_jax.model.cache import init_cache
from tests.support import MODELS, random_model, with_mlps_on_host

# Its end stands in it before: there is always something to look up.
PROMPT = [5, 9, 11, 5, 9, 11, 5, 9, 11]
# The first token is the prefill's, and three verifications make four tokens each.
NEW = 13


def without_outputs(params, skipped):
    """`params` with zeros for the down projections of layers `skipped`, biases as they are."""
    layers = [
        replace(layer, mlp=replace(layer.mlp, down=replace(layer.mlp.down, weight=0 * layer.mlp.down.weight)))
        if l in skipped
        else layer
        for l, layer in enumerate(params.layers)
    ]
    return replace(params, layers=tuple(layers))


def logits_of(params, tokens):
    cache = init_cache(params.config, 1, len(tokens), params.dtype)
    hidden, _, _ = extend(params, jnp.asarray([tokens]), cache, jnp.zeros(1, jnp.int32), observe_nothing)
    return np.asarray(unembed(params, hidden))


@pytest.mark.parametrize("on_host", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_agrees_with_all_that_itself_drafts(on_host):
    params = random_model(MODELS["llama"])
    full = ci.generate(params, [PROMPT], None, max_new_tokens=NEW).tokens[0]
    reading = with_mlps_on_host(params) if on_host else params
    made = drafters.continued(reading, Drafter(params, looks_up=False), PROMPT, NEW)
    np.testing.assert_array_equal(made.tokens, full)
    assert made.drafts == {
        "tokens_per_pass": 4,
        "accepted_per_draft": 3,
        "verifications": 3,
        "single_passes": 0,
        "core_steps": 9,
        "size": 3,
        "step_share": 1,
    }
    # Other weights of the same shapes run the same program, and change no token.
    other = drafters.continued(reading, Drafter(random_model(MODELS["llama"], seed=1), looks_up=False), PROMPT, NEW)
    np.testing.assert_array_equal(other.tokens, full)
    assert other.drafts["accepted_per_draft"] < 3


def test_earlier_words_draft_where_nothing_else_does():
    params = random_model(MODELS["llama"])
    # A text that has begun to repeat itself, so that some of what is looked up is right.
    text = ci.generate(params, [PROMPT], None, max_new_tokens=60 + NEW).tokens[0]
    made = drafters.continued(params, Drafter(None, looks_up=True), [*PROMPT, *text[:60].tolist()], NEW)
    np.testing.assert_array_equal(made.tokens, text[60:])
    assert made.drafts["core_steps"] == made.drafts["step_share"] == 0
    # One token comes before the first pass, and each pass makes one at least.
    assert made.drafts["verifications"] + made.drafts["single_passes"] < NEW - 1
    assert made.drafts["accepted_per_draft"] > 0


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_skipped_mlp_adds_its_bias_alone(family):
    params = random_model(MODELS[family])
    ours = logits_of(drafters.skipping(params, [1]), PROMPT)
    np.testing.assert_allclose(ours, logits_of(without_outputs(params, [1]), PROMPT), rtol=1e-5, atol=1e-5)
    assert np.abs(ours - logits_of(params, PROMPT)).max() > 0.1


def test_the_mlp_that_does_nothing_is_missed_least():
    params = random_model(MODELS["llama"])
    assert drafters.least_missed(without_outputs(params, [1]), PROMPT, 1) == [1]
    assert 2 in drafters.least_missed(without_outputs(params, [2]), PROMPT, 2)


@pytest.mark.slow
def test_no_way_changes_a_token():
    params = random_model(MODELS["llama"])
    ways = lossless.ways_of(params, params, PROMPT, [1], NEW)
    assert set(ways) == {*lossless.WAYS, *lossless.ALWAYS}
    found = lossless.compared(ways, PROMPT, NEW, rounds=1)
    assert all(own["same_tokens"] for own in found.values())
    assert [found[way]["drafts"]["core_steps"] > 0 for way in lossless.ALWAYS] == [True, False, True, True]


def test_ways_are_compared_with_the_first_round_by_round():
    seconds = iter([9.0, 9.0, 2.0, 1.0, 4.0, 1.0])  # the first turn is not counted

    def way(tokens):
        return lambda prompt, new: Continued(np.asarray(tokens), next(seconds), moved_bytes=6 * len(tokens))

    found = lossless.compared({"full": way([4, 5, 6]), "other": way([4, 5, 7, 8])}, PROMPT, NEW, rounds=2)
    assert found["full"]["ms_per_token"] == {"median": 1500, "min": 1000, "max": 2000}
    assert found["other"]["times_as_fast"] == {"median": 4.5, "min": 3, "max": 6}
    assert [own["same_tokens"] for own in found.values()] == [True, False]
    assert found["other"]["moved_bytes_per_token"] == 6


def test_without_accelerate_it_is_said_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(lossless, "find_spec", lambda name: None if name == "accelerate" else SimpleNamespace())
    assert lossless._offloaded(random_model(MODELS["llama"]), None) == {}
    said = capsys.readouterr().err
    assert said == (
        "transformers with accelerate is left out, not installed: accelerate; pip install '.[accelerate]'\n"
    )


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_accelerate_reads_mlps_for_each_pass(family, tmp_path):
    pytest.importorskip("accelerate")
    from benchmarks.contenders import offloaded

    params = random_model(replace(MODELS[family], eos_ids=()))
    model = offloaded.load(params, tmp_path)
    elsewhere = [name for name, weight in model.named_parameters() if weight.device.type == "meta"]
    of_layer = {"llama": ("gate_proj", "up_proj", "down_proj"), "opt": ("fc1", "fc2")}[family]
    assert {name.split(".")[-2] for name in elsewhere} == set(of_layer)
    assert len({name.rsplit(".", 1)[0] for name in elsewhere}) == len(params.layers) * len(of_layer)
    full = ci.generate(params, [PROMPT], None, max_new_tokens=NEW).tokens[0]
    np.testing.assert_array_equal(offloaded.continued(model, PROMPT, NEW).tokens, full)


def result(model="a", on_host=False, **ways):
    one = {"median": 1.5, "min": 1.0, "max": 2.0}
    drafts = {"tokens_per_pass": 1.25, "accepted_per_draft": 0.5, "step_share": 0.75, "size": 3}
    way = {
        "ms_per_token": one,
        "times_as_fast": one,
        "moved_bytes_per_token": 2e6,
        "same_tokens": True,
        "drafts": drafts,
    }
    return {
        "model": model,
        "kind": "story",
        "on_host": on_host,
        "skipped": [1, 2],
        "layers": 5,
        "hardware": "",
        "versions": {},
        "git_revision": "",
        "date": "",
        "ways": dict.fromkeys((*lossless.WAYS, *lossless.ALWAYS), way)
        | {name: way | own for name, own in ways.items()},
    }


def test_the_tables_show_drafters_and_accelerate(monkeypatch):
    other = {"median": 0.5, "min": 0.25, "max": 0.75}
    results = [result(), result(on_host=True, **{lossless.OFFLOADED: {"times_as_fast": other}})]
    monkeypatch.setattr(lossless, "read_results", lambda name: results)
    _, _, here, there = lossless.table().partition("\n\n")[0].splitlines()
    assert here.endswith("| 1.25, 1.25 |  |  |")
    assert there.endswith("| 1.25, 1.25 | 2, 2, 2 | 0.50 (0.25 .. 0.75) |")
    shown = lossless.always_table()
    assert "| a, story " + 4 * "| 0.50, 1.50 (1.00 .. 2.00) " + "|" in shown
    assert "2 of 5 (a), 75% of the bytes" in shown
    assert "all tokens are the full model's own" in shown
    results[1]["ways"]["always skipping"] |= {"same_tokens": False}
    assert "SOME TOKENS ARE NOT" in lossless.always_table()
