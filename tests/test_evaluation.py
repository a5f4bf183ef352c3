"""What an evaluation measures, against plain NumPy and decoding token by token on narrowed weights."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.cli import eval_texts, main
from coreinfer_jax.cli.arguments import labels
from coreinfer_jax.lab.evaluation.comparison import Texts, evaluate, interval, perplexity, summary
from coreinfer_jax.lab.evaluation.free_running import departure, free_running, generating, repetition
from coreinfer_jax.lab.evaluation.measure import Measured, collect, measure
from coreinfer_jax.lab.evaluation.settings import PER_TOKEN, RANKINGS, Foreknown, PerToken, kept_by
from coreinfer_jax.lab.reading import planned
from coreinfer_jax.model import extend, observe_nothing, unembed
from coreinfer_jax.model.cache import init_cache
from coreinfer_jax.model.weights import weight_bytes_per_step
from coreinfer_jax.sparsity.choosers import settings_of
from coreinfer_jax.sparsity.neurons import CoreNeurons
from coreinfer_jax.sparsity.rules import Energy, Votes
from coreinfer_jax.sparsity.votes import kept_neurons
from coreinfer_jax.text.corpus import Beginnings, Corpus
from coreinfer_jax.text.documents import Documents, read_documents
from tests.stand_ins import shallow_model
from tests.support import MODELS, first_quick, half_slow, one_quick_in, random_model
from tests.test_compilation import traced
from tests.test_generate import run_all

CONTEXT, REST = 11, 6
N = 3


def texts(config, rows=N, size=CONTEXT + REST + 1):
    return np.random.default_rng(1).integers(3, config.vocab_size, (rows, size)).astype(np.int32)


def setting(rule, keep, compensation=0.0, prior_tokens=0.0, **others):
    """Every layer alike, by the rule of a name."""
    if rule in PER_TOKEN:
        return PerToken(rule=rule, beta=keep, **others)
    ranking = replace(RANKINGS[rule], prior_tokens=prior_tokens)
    return ci.CoreConfig(**{"allocation": "equal"} | others, rule=ranking, beta=keep, compensation=compensation)


def whole(rows):
    return Beginnings(rows, np.full(len(rows), rows.shape[1], np.int32))


def run_tokens(params, tokens, cache, start):
    logits, cache, seen = run_all(params, jnp.asarray(tokens), cache, jnp.full(len(tokens), start, jnp.int32))
    return np.asarray(logits, np.float64), cache, seen


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def decoded(params, rows, choose):
    """KL, agreement and loss of decoding on `choose`(activations per layer) token by token: [n, REST] each."""
    config = params.config
    kl, agreement, loss = [], [], []
    for row in rows:
        empty = init_cache(config, 1, CONTEXT + REST, jnp.dtype("float32"))
        full, _, _ = run_tokens(params, row[None, :-1], empty, 0)
        _, cache, seen = run_tokens(params, row[None, :CONTEXT], empty, 0)
        narrowed = ci.compact(params, choose([np.asarray(a[0], np.float64) for a in seen]))
        steps = []
        for t in range(CONTEXT, CONTEXT + REST):
            logits, cache, _ = run_tokens(narrowed, row[None, t : t + 1], cache, t)
            steps.append(logits[0, 0])
        p, q = log_softmax(full[0, CONTEXT:]), log_softmax(np.stack(steps))
        kl.append((np.exp(p) * (p - q)).sum(axis=-1))
        agreement.append(p.argmax(axis=-1) == q.argmax(axis=-1))
        loss.append(-q[np.arange(REST), row[CONTEXT + 1 :]])
    return np.stack(kl), np.stack(agreement), np.stack(loss)


@pytest.mark.parametrize(("model", "count_bos"), one_quick_in(4, MODELS, [True, False]))
def test_one_pass_equals_decoding_token_by_token_on_narrowed_weights(model, count_bos):
    params = random_model(MODELS[model])
    rows = texts(params.config)
    rows[:, 0] = params.config.bos_id
    norms = [np.linalg.norm(np.asarray(layer.mlp.down.weight, np.float64), axis=0) for layer in params.layers]
    kept = kept_neurons(0.4, params.config.mlp_size)

    def energy(activations):
        counted = [a if count_bos else a[1:] for a in activations]
        scores = [(a**2).sum(axis=0) * norm**2 for a, norm in zip(counted, norms, strict=True)]
        return CoreNeurons(np.sort(np.argsort(-own, kind="stable")[:kept]) for own in scores)

    kl, agreement, loss = decoded(params, rows, energy)
    _, (found,) = measure(params, rows, CONTEXT, [setting("energy", 0.4, count_bos=count_bos)])
    np.testing.assert_allclose(found.kl, kl, rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.agreement, agreement)


def test_batches_are_about_as_full_as_each_other():
    parts = planned(16, 10)
    assert [real for _, real in parts] == [8, 8]
    np.testing.assert_array_equal(np.concatenate([batch for batch, _ in parts]), np.arange(16))
    [(first, _), (last, real)] = planned(5, 4)
    assert (first.tolist(), last.tolist(), real) == ([0, 1, 2], [3, 4, 3], 2)
    assert planned(0, 4) == []


@pytest.mark.slow
def test_contexts_of_several_lengths_are_each_measured_as_alone():
    params = random_model(MODELS["llama"])
    contexts = np.array([5, CONTEXT, 8], np.int32)
    rows = texts(params.config)
    settings = [setting("energy", 0.4), Foreknown(setting("votes", 0.3)), setting("token-norm", 0.5)]
    losses, measured = measure(params, rows, contexts, settings)
    for i, context in enumerate(contexts.tolist()):
        alone_losses, alone = measure(params, rows[i : i + 1, : context + REST + 1], context, settings)
        np.testing.assert_allclose(losses[i], alone_losses[0], rtol=1e-4)
        for one, other in zip(measured, alone, strict=True):
            np.testing.assert_allclose(one.kl[i], other.kl[0], rtol=1e-3, atol=1e-5)
            np.testing.assert_array_equal(one.agreement[i], other.agreement[0])


def test_paper_votes_are_those_that_generate_decodes_with():
    params = random_model(MODELS["llama"])
    rows = texts(params.config)
    core = replace(ci.CoreConfig.paper(), beta=0.3)

    def chosen(activations):
        return CoreNeurons(
            np.asarray(ci.select_core_neurons(jnp.asarray(a, jnp.float32), 0.4, core.beta)) for a in activations
        )

    kl, _, _ = decoded(params, rows, chosen)
    _, (found,) = measure(params, rows, CONTEXT, [setting("votes", 0.3)])
    np.testing.assert_allclose(found.kl, kl, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("model", ["llama", pytest.param("opt", marks=pytest.mark.slow)])
def test_all_neurons_change_nothing_whatever_the_rule(model):
    params = random_model(MODELS[model])
    rows = texts(params.config)
    prior = collect(params, whole(rows))
    settings = [
        setting(rule, 1.0, compensation, tokens)
        for rule in RANKINGS
        for compensation, tokens in ((0.0, 0.0), (0.5, 9.0))
    ]
    settings += [setting(rule, 1.0) for rule in PER_TOKEN]
    full, measured = measure(params, rows, CONTEXT, settings, prior=prior)
    for one in measured:
        assert np.abs(one.kl).max() < 1e-6
        assert one.agreement.all()
        np.testing.assert_allclose(one.loss, full, rtol=1e-5, atol=1e-5)


def with_constant(layer, constant):
    down = layer.mlp.down
    bias = jnp.asarray(constant) if down.bias is None else down.bias + constant
    return replace(layer, mlp=replace(layer.mlp, down=replace(down, bias=bias)))


def test_a_prior_is_what_the_texts_sum_to(monkeypatch):
    params = random_model(MODELS["llama"])
    rows = texts(params.config, rows=5)
    empty = init_cache(params.config, 5, rows.shape[1], jnp.dtype("float32"))
    _, _, seen = run_tokens(params, rows, empty, 0)
    # The last batch is of one.
    monkeypatch.setattr("coreinfer_jax.lab.evaluation.measure.BATCH_TOKENS", 2 * rows.shape[1])
    lengths = rows.shape[1] - np.arange(5, dtype=np.int32)
    read = np.arange(rows.shape[1])[None, :, None] < lengths[:, None, None]
    prior = collect(params, Beginnings(rows, lengths))
    for energy, votes, a in zip(prior[Energy()], prior[Votes()], seen, strict=True):
        a = np.where(read, np.asarray(a), 0)
        assert int(energy["tokens"]) == lengths.sum()
        np.testing.assert_allclose(energy["squares"], (a**2).sum(axis=(0, 1)), rtol=1e-5)
        np.testing.assert_allclose(votes["total"], a.sum(axis=(0, 1)), rtol=1e-4, atol=1e-4)


def by_magnitude(rule, kept, norms):
    """An edit that leaves each token the neurons that are largest by a rule's definition, in NumPy."""

    def edit(l, layer, seen):
        a, norm = np.asarray(seen.activations), norms[l]
        by_rule = {"token-magnitude": np.abs(a), "token-norm": np.abs(a) * norm, "token-gate": np.abs(seen.gated)}
        magnitude = by_rule[rule]
        last = np.sort(magnitude, axis=-1)[..., -kept, None]
        return jnp.asarray(np.where(magnitude >= last, a, 0))

    return edit


@pytest.mark.parametrize(("model", "rule"), half_slow(["opt", "llama"], PER_TOKEN))
def test_neurons_of_each_token_are_those_of_numpy(model, rule):
    params = random_model(MODELS[model])
    rows, kept = texts(params.config), kept_neurons(0.3, params.config.mlp_size)
    norms = [np.linalg.norm(np.asarray(layer.mlp.down.weight), axis=0) for layer in params.layers]
    empty = init_cache(params.config, N, CONTEXT + REST, jnp.dtype("float32"))
    full, _, _ = run_tokens(params, rows[:, :-1], empty, 0)
    _, cache, _ = run_tokens(params, rows[:, :CONTEXT], empty, 0)
    start = jnp.full(N, CONTEXT, jnp.int32)
    edit = by_magnitude(rule, kept, norms)
    hidden, _, _ = extend(params, jnp.asarray(rows[:, CONTEXT:-1]), cache, start, observe_nothing, edit)
    p, q = log_softmax(full[:, CONTEXT:]), log_softmax(np.asarray(unembed(params, hidden), np.float64))
    _, (found,) = measure(params, rows, CONTEXT, [setting(rule, 0.3)])
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(axis=-1), rtol=2e-3, atol=2e-5)


@pytest.mark.slow
def test_all_rules_run_on_16_bit_weights():
    params = random_model(MODELS["llama"], dtype="bfloat16")
    settings = [setting(rule, 0.3) for rule in (*RANKINGS, *PER_TOKEN)]
    _, measured = measure(params, texts(params.config), CONTEXT, settings)
    assert all(np.isfinite(one.kl).all() and one.kl.mean() > 0 for one in measured)


def test_a_corpus_begins_with_texts_of_any_length():
    documents = Documents("numbers", "", tuple(" ".join(["7"] * n) for n in (3, 9, 5, 0, 7, 4)))
    corpus = Corpus(documents, Numbers(), 0)
    every = corpus.beginnings(6, 1000)
    assert sorted(every.lengths.tolist()) == [3, 4, 5, 6, 6]
    assert every.rows.shape == (5, 6)
    np.testing.assert_array_equal((every.rows == 7).sum(axis=1), every.lengths)
    assert corpus.beginnings(6, 8).lengths.tolist() == every.lengths.tolist()[:2]
    halves = [corpus.beginnings(6, 1000, half).lengths.tolist() for half in (0, 1)]
    assert [*halves[0], *halves[1]] == every.lengths.tolist()
    with pytest.raises(ci.CoreInferError, match="numbers: 1 of 2 documents have any tokens"):
        Corpus(Documents("numbers", "", ("7", "")), Numbers(), 0).beginnings(6, 1000)


@pytest.mark.parametrize("model", first_quick(["llama", "opt"]))
def test_compensation_is_a_constant_added_to_the_output(model):
    params = random_model(MODELS[model])
    rows = texts(params.config, rows=1)
    kept = kept_neurons(0.2, params.config.mlp_size)
    empty = init_cache(params.config, 1, CONTEXT + REST, jnp.dtype("float32"))
    full, _, _ = run_tokens(params, rows[:, :-1], empty, 0)
    _, cache, seen = run_tokens(params, rows[:, :CONTEXT], empty, 0)
    sets, constants = [], []
    for layer, a in zip(params.layers, seen, strict=True):
        norms = np.linalg.norm(np.asarray(layer.mlp.down.weight), axis=0)
        mean = np.asarray(a[0]).mean(axis=0)
        lost = ((np.asarray(a[0]) - 0.5 * mean) ** 2).mean(axis=0)
        order = np.argsort(-lost * norms**2, kind="stable")
        sets.append(np.sort(order[:kept]))
        dropped = order[kept:]
        constants.append(np.asarray(layer.mlp.down.weight)[:, dropped] @ (0.5 * mean[dropped]))
    narrowed = ci.compact(params, CoreNeurons(sets))
    layers = [with_constant(layer, own) for layer, own in zip(narrowed.layers, constants, strict=True)]
    logits, _, _ = run_tokens(replace(narrowed, layers=tuple(layers)), rows[:, CONTEXT:-1], cache, CONTEXT)
    p, q = log_softmax(full[:, CONTEXT:]), log_softmax(logits)
    _, (found,) = measure(params, rows, CONTEXT, [setting("energy", 0.2, compensation=0.5)])
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(axis=-1), rtol=2e-3, atol=2e-5)


def test_layers_that_are_not_narrowed_keep_all_neurons():
    params = random_model(MODELS["opt"])
    rows = texts(params.config)
    assert kept_by(setting("energy", 0.2, layers=(0.5, 1.0)), params).tolist() == [96, 96, 19]
    _, (partly, whole) = measure(
        params, rows, CONTEXT, [setting("energy", 0.2, layers=(0.5, 1.0)), setting("energy", 0.2)]
    )
    assert partly.kl.mean() < whole.kl.mean()


@pytest.mark.slow
def test_neurons_of_each_token_are_a_ceiling(data):
    params, tokenizer = shallow_model("llama")
    documents = read_documents(data / "text" / "tinystories_val.txt")
    settings = [setting(rule, 0.4) for rule in (*RANKINGS, *PER_TOKEN)] + [Foreknown(setting("energy", 0.4))]
    results = evaluate(params, tokenizer, documents, settings, Texts((32,), 24, 6))
    kl = {(r["rule"], r["known"]): r["kl"]["mean"] for r in results}
    fixed = [kl[rule, "context"] for rule in RANKINGS]
    assert kl["token-norm", "context"] < min(fixed)
    assert kl["energy", "continuation"] < min(fixed)
    assert max(fixed) <= max(kl["random", "context"], kl["norm", "context"])


def test_prior_tokens_need_a_prior():
    params = random_model(MODELS["opt"])
    with pytest.raises(ci.CoreInferError, match="prior tokens are of a prior"):
        measure(params, texts(params.config), CONTEXT, [setting("energy", 0.5, prior_tokens=3.0)])


def test_prompt_lengths_are_scored_on_the_same_tokens():
    params = random_model(MODELS["opt"])
    results = evaluate(params, Numbers(), numbers(4), [setting("votes", 0.5)], Texts((4, 16), 8, 4))
    assert results[0]["dense_perplexity"] != results[1]["dense_perplexity"]
    longest = evaluate(params, Numbers(), numbers(4), [setting("votes", 0.5)], Texts((16,), 8, 4))
    assert results[1] == longest[0]


def test_a_switched_continuation_is_that_of_another_text():
    params = random_model(MODELS["opt"])
    own, other = (
        evaluate(params, Numbers(), numbers(2), [setting("votes", 0.5)], Texts((8,), 8, 2, switched))[0]
        for switched in (False, True)
    )
    assert own["kl"] != other["kl"]


def test_what_generate_writes_is_compared_with_the_full_models():
    params = random_model(replace(MODELS["opt"], eos_ids=()))
    prompts = texts(params.config, rows=3, size=9)
    cores = [setting("contribution", 0.3, 0.5, allocation="sensitivity"), ci.CoreConfig(beta=1.0)]
    full, narrowed, whole = free_running(params, prompts, cores, 12)
    made = [
        ci.generate(params, prompts, core, max_new_tokens=12, eos_ids=params.config.eos_ids)
        for core in (None, ci.CoreConfig(beta=0.3))
    ]
    rows = [[row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)] for out in made]
    pairs = [np.array([a[: len(b)], b[: len(a)]]) for a, b in zip(*rows, strict=True)]
    common = [np.cumprod(pair[0] == pair[1]).sum() for pair in pairs]
    assert narrowed["departure"]["mean"] == np.mean(common)
    assert full["departure"]["mean"] == full["length"]["mean"] == np.mean([len(row) for row in rows[0]])
    assert narrowed["length"]["mean"] == np.mean([len(row) for row in rows[1]])
    assert whole == full
    assert 1 < np.mean(common) < 12


def test_phrases_of_four_tokens_count_when_they_come_again():
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3]) == 0
    assert departure([1, 2, 3], [1, 2, 4]) == 2
    assert departure([1, 2], [1, 2, 4]) == 2


def test_a_setting_generates_as_it_is_evaluated():
    params = random_model(MODELS["opt"])
    assert setting("votes", 0.2) == ci.CoreConfig.paper()
    mean = setting("votes-mean-budget", 0.2)
    assert generating([mean], params) == [replace(ci.CoreConfig.paper(), rule=Votes(budget="mean"))]
    for other, said in (
        (setting("token-norm", 0.2), "neurons of its own"),
        (Foreknown(setting("energy", 0.2)), "not known before"),
        (setting("energy", 0.2, prior_tokens=64), "without a prior"),
    ):
        with pytest.raises(ci.CoreInferError, match=said):
            generating([other], params)


def test_what_cannot_be_compared_is_refused():
    params, texts = random_model(MODELS["opt"]), Texts((4,), 8, 2)
    for other, said in (
        (ci.Similarity(), "give a CoreConfig, a PerToken or a Foreknown"),
        (Foreknown(setting("token-norm", 0.2)), "give a CoreConfig, a PerToken or a Foreknown"),
        (ci.CoreConfig(per_row=False), "per_row=False"),
        (ci.CoreConfig(layers=(0.9, 1.0)), "selects none"),
    ):
        with pytest.raises(ci.CoreInferError, match=said):
            evaluate(params, Numbers(), numbers(2), [other], texts)
    with pytest.raises(ci.CoreInferError, match="rule='token-max'"):
        PerToken(rule="token-max", beta=0.4)


def test_a_new_alpha_compiles_nothing():
    params = random_model(MODELS["opt"])
    rows = texts(params.config)

    def run(alpha):
        core = replace(ci.CoreConfig.paper(), rule=Votes(alpha=alpha, prior_tokens=3))
        prior = collect(params, whole(rows), [core.ranking])
        return measure(params, rows, CONTEXT, [core, Foreknown(core)], prior=prior)[1][0].kl

    first = run(0.4)
    with traced() as messages:
        other = run(0.7)
    assert messages == []
    assert (first != other).any()


class Numbers:
    """A tokenizer of numbers with spaces between them."""

    def encode(self, text):
        return [int(word) for word in text.split()]


def numbers(count, size=40):
    generator = np.random.default_rng(5)
    lines = [" ".join(map(str, generator.integers(3, 101, size))) for _ in range(count)]
    return Documents("numbers.txt", "", tuple(lines))


def test_intervals_hold_the_mean_and_shrink_with_texts():
    generator = np.random.default_rng(0)
    wide, narrow = (interval(generator.normal(5, 1, n), 0) for n in (20, 2000))
    for found in (wide, narrow):
        assert found["ci95"][0] < found["mean"] < found["ci95"][1]
    # 1.96 standard errors on either side.
    assert abs((narrow["ci95"][1] - narrow["ci95"][0]) - 2 * 1.96 / 2000**0.5) < 0.01
    assert interval(np.full(4, 0.25), 0) == {"mean": 0.25, "ci95": [0.25, 0.25]}


def test_summaries_are_means_over_texts_and_by_position():
    kl = np.arange(40, dtype=np.float32).reshape(2, 20)
    found = summary(Measured(kl, kl / 40, kl / 10), 0)
    assert found["kl"]["mean"] == kl.mean()
    np.testing.assert_allclose(found["kl_by_position"], [kl[:, :16].mean(), kl[:, 16:].mean()])
    means = np.array([kl[:, :16].mean(), kl[:, 16:].mean()]) / 10
    np.testing.assert_allclose(found["perplexity_by_position"], np.exp(means), rtol=1e-6)
    np.testing.assert_allclose(found["perplexity"]["mean"], np.exp(kl.mean() / 10), rtol=1e-6)
    np.testing.assert_allclose(perplexity(kl[:, :1] * 0 + 2, 0)["ci95"], [np.exp(2), np.exp(2)])


@pytest.fixture
def on_texts(shallow, tmp_path):
    """Options that name a model and three texts."""
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(["Once upon a time there was a king who had a daughter and a garden. " * 4] * 3))
    return ["--model", str(shallow["opt"]), "--data", str(path)]


def test_the_command_reports_every_setting(on_texts, capsys):
    sizes = ["--prompt-tokens", "8", "16", "--continuation", "8", "--texts", "3"]
    arguments = ["eval", *on_texts, "--rule", "votes", "random", "--beta", "0.2", "0.6", *sizes]
    assert main([*arguments, "--generate", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(s["prompt_tokens"], s["rule"], s["keep"]) for s in found["settings"]] == [
        (n, rule, keep) for n in (8, 16) for rule in ("votes", "random") for keep in (0.2, 0.6)
    ]
    for setting in found["settings"]:
        for name in ("kl", "agreement", "perplexity"):
            low, high = setting[name]["ci95"]
            assert low <= setting[name]["mean"] <= high
    written = found["generated"]
    assert [(one["prompt_tokens"], one["core"] and one["core"]["rule"]) for one in written] == [
        (n, rule) for n in (8, 16) for rule in (None, "votes", "votes", "random", "random")
    ]
    assert written[0]["departure"]["mean"] == written[0]["length"]["mean"]
    assert main([*arguments, "--generate", "6"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 8 + 1 + 1 + 10


def test_the_default_is_what_generate_uses_and_the_paper_is_the_papers(tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(["Once upon a time there was a king who had a daughter and a garden. " * 4] * 2))
    sizes = ["--prompt-tokens", "8", "--continuation", "8", "--texts", "2", "--json"]
    found = {}
    for preset in ("default", "paper"):
        assert main(["eval", "--data", str(path), "--preset", preset, *sizes]) == 0
        found[preset] = json.loads(capsys.readouterr().out.splitlines()[-1])["settings"][0]
    keys = ("rule", "keep", "compensation", "prior_tokens", "allocation")
    assert [found["default"][key] for key in keys] == ["contribution", ci.CoreConfig().beta, 0.5, 256.0, "sensitivity"]
    assert [found["paper"][key] for key in keys] == ["votes", 0.2, 0.0, 0.0, "equal"]


def test_alphas_and_ranges_of_layers_are_compared_and_drawn(on_texts, shallow, tmp_path, capsys):
    arguments = ["eval", *on_texts, "--prompt-tokens", "8", "--continuation", "8", "--texts", "2", "--json"]
    arguments += ["--rule", "votes", "--alpha", "0.2", "0.6", "--beta", "0.2", "0.6", "--layers", "0", "1"]
    arguments += ["--layers", "0.5", "1", "--chart", str(tmp_path / "chart.png")]
    assert main(arguments) == 0
    settings = json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]
    assert [(s["alpha"], s["layers"], s["keep"]) for s in settings] == [
        (alpha, layers, keep) for alpha in (0.2, 0.6) for layers in ([0, 1], [0.5, 1]) for keep in (0.2, 0.6)
    ]
    assert len({s["kl"]["mean"] for s in settings}) == len(settings)
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    params, _ = ci.load(shallow["opt"])
    row = 4 * params.config.hidden_size  # bytes of a neuron in one matrix of the two
    whole = weight_bytes_per_step(params, 1)
    assert settings[0]["bytes_per_token"] == whole - 2 * 2 * (768 - 153) * row
    assert settings[2]["bytes_per_token"] == whole - 2 * (768 - 153) * row


CHARTS = {
    "no kind of picture": ("chart.unknown", "end it in .png or .svg"),
    "no ending": ("chart", "end it in .png or .svg"),
    "a directory that is not there": ("absent/chart.png", "absent: No such file or directory"),
    "a directory": ("there.png", "is a directory"),
}


@pytest.mark.parametrize(("name", "said"), CHARTS.values(), ids=CHARTS)
def test_a_chart_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    name, said, on_texts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(eval_texts, "compare", None)
    (tmp_path / "there.png").mkdir()
    before = sorted(tmp_path.iterdir())
    assert main(["eval", *on_texts, "--chart", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_the_table_is_printed_where_drawing_fails(on_texts, tmp_path, capsys, monkeypatch):
    def fail(results, path):
        raise ci.CoreInferError("the disk is full")

    monkeypatch.setattr(eval_texts, "draw", fail)
    sizes = ["--prompt-tokens", "8", "--continuation", "8", "--texts", "2", "--beta", "0.4"]
    assert main(["eval", *on_texts, *sizes, "--chart", str(tmp_path / "chart.png")]) == 2
    said = capsys.readouterr()
    assert "agreement" in said.out
    assert "the disk is full" in said.err


def test_tables_tell_settings_apart_by_what_differs(on_texts, capsys):
    sizes = ["--prompt-tokens", "8", "--continuation", "8", "--texts", "2", "--generate", "3"]
    arguments = ["--beta", "0.2", "0.4", "--allocation", "sensitivity", "equal"]
    assert main(["eval", *on_texts, *sizes, *arguments]) == 0
    measured, written = capsys.readouterr().out.split("\n\n")
    assert [line.count("layers alike") for line in measured.splitlines()] == [0, 0, 0, 1, 1]
    for line, label in zip(
        written.splitlines()[1:],
        ("all neurons", *(f"keep {keep}, allocation {way}" for way in ("sensitivity", "equal") for keep in (0.2, 0.4))),
        strict=True,
    ):
        assert f"  {label}  " in line


def test_linear_neurons_are_compared_with_none(on_texts, capsys):
    sizes = ["--prompt-tokens", "8", "--continuation", "8", "--texts", "2"]
    assert main(["eval", *on_texts, *sizes, "--beta", "0.2", "--linear", "yes", "no", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]
    assert [s["linear"] for s in settings] == [True, False]
    assert settings[1]["linear_layers"] == 0
    assert main(["eval", *on_texts, *sizes, "--beta", "0.2", "--linear", "yes", "no"]) == 0
    assert [line.count("no linear") for line in capsys.readouterr().out.splitlines()] == [0, 0, 1]


def test_a_setting_is_named_by_its_keep_ratio_and_what_others_do_not_share():
    contribution = settings_of(ci.CoreConfig(beta=0.3))
    votes = settings_of(ci.CoreConfig(beta=0.3, rule="votes", compensation=0))
    assert labels([None, contribution]) == ["all neurons", "keep 0.3"]
    assert labels([None, contribution, votes]) == [
        "all neurons",
        "contribution, keep 0.3, compensation 0.5, prior tokens 256.0",
        "votes, keep 0.3, compensation 0, prior tokens 0.0",
    ]
    assert labels([votes | {"alpha": 0.2}, votes]) == ["keep 0.3, alpha 0.2", "keep 0.3, alpha 0.4"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--beta", "1.5"], "beta=1.5"),
        (["--prompt-tokens", "0"], "at least 1"),
        (["--prompt-tokens", "100000"], "exceed the model's"),
        (["--texts", "1"], "texts=1"),
        (["--alpha", "0"], "alpha=0"),
        (["--model", "{shallow[opt]}", "--prior-tokens", "5"], "no rule here has a prior to weigh; give --prior FILE"),
        (["--rule", "votes", "--prior-tokens", "5"], "no rule here has a prior to weigh; give --prior FILE"),
        (["--generate", "100000"], "positions"),
        (["--generate", "4", "--rule", "token-norm"], "neurons of its own"),
        (["--compensation", "2"], "compensation=2"),
        (["--layers", "0.5", "0.2"], "layers="),
        (["--prompt-tokens", "64"], "texts of 129 tokens are needed"),
    ],
)
def test_mistakes_get_one_line(shallow, tmp_path, capsys, arguments, said):
    path = tmp_path / "texts.txt"
    path.write_text("A short text.\nAnother one.\n")
    arguments = [argument.format(shallow=shallow) for argument in arguments]
    assert main(["eval", "--data", str(path), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert said in error[-1]
    assert error[-1].startswith("coreinfer: error: ")
