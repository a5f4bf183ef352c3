"""What a calibration says of a model, where it lies, and how generation goes by it."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import coreinfer_jax as ci
from coreinfer_jax.cli import main
from coreinfer_jax.io.calibration_file import CALIBRATION, SHIPPED, read_calibration, read_facts, write_calibration
from coreinfer_jax.lab.evaluation import Bound, Texts, calibrate, material
from coreinfer_jax.lab.evaluation.material import from_documents, own_answers
from coreinfer_jax.model.weights import named_leaves, params_bytes, with_leaves
from coreinfer_jax.sparsity.allocate import allocate
from coreinfer_jax.sparsity.calibration import Calibration
from coreinfer_jax.sparsity.rules import Contribution
from coreinfer_jax.text.documents import Documents
from tests.support import LLAMA, MODELS, OPT, check_same_core, first_quick, half_slow, random_model
from tests.test_compilation import traced
from tests.test_generate import PROMPTS, prompt_activations

SMALL = Texts(prompt_tokens=(8,), continuation=8, texts=8)


@pytest.fixture(scope="module", autouse=True)
def few_settings() -> Iterator[None]:
    """Some of the keep ratios that a calibration tries, and one round of timing: the others do the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coreinfer_jax.lab.evaluation.calibrating.KEEPS", (0.05, 0.3, 0.6, 0.8, 0.95))
        patch.setattr("coreinfer_jax.lab.evaluation.sensitivity.LINEAR_TRIED", (0.35, 0.8))
        patch.setattr("coreinfer_jax.cli.calibrate.ROUNDS", 1)
        yield


class Numbers:
    """A tokenizer of numbers with spaces between them."""

    def encode(self, text):
        return [int(word) for word in text.split()]


class Lengths:
    """A tokenizer whose ids are the lengths of words; a chat is opened by the id 90."""

    def __init__(self, has_chat_template=False):
        self.has_chat_template = has_chat_template

    def encode(self, text):
        return [3 + len(word) for word in text.split()]

    def encode_chat(self, messages):
        [message] = messages
        return [90, *self.encode(message["content"])]


def documents(count=12, size=20):
    generator = np.random.default_rng(5)
    return Documents(
        "numbers.txt", "", tuple(" ".join(map(str, generator.integers(3, 101, size))) for _ in range(count))
    )


def moments(a, norms):
    """The sums of contribution over tokens a [T, F], from their definition."""
    a = a.astype(np.float64)
    weights = 1 / ((a * norms) ** 2).sum(axis=1)
    return weights.sum(), weights @ a, weights @ a**2


# Of F = 96 neurons in each of 3 layers, 38 is the share 0.4; the first keeps 0.4 + 0.6 * 0.6 of its own.
KEPT = (72, 21, 21)


def expected_core(params, a, kept_neurons, share, prior=None, prior_tokens=0.0):
    """Neurons, so many per layer, and offsets from activations [T, F] per layer and sums of other texts."""
    layers, offsets = [], []
    for l, own in enumerate(a):
        down = np.asarray(params.layers[l].mlp.down.weight, np.float64)
        norms = np.linalg.norm(down, axis=0)
        weight, total, squares = moments(own, norms)
        if prior is not None:
            scale = prior_tokens / float(prior[l]["tokens"])
            weight += scale * float(prior[l]["weight"])
            total = total + scale * np.asarray(prior[l]["total"], np.float64)
            squares = squares + scale * np.asarray(prior[l]["squares"], np.float64)
        stands = share * total / weight
        lost = (squares - 2 * stands * total + stands**2 * weight) * norms**2
        order = np.argsort(-lost, kind="stable")
        kept = kept_neurons[l]
        layers.append(np.sort(order[:kept]))
        offsets.append(down[:, order[kept:]] @ stands[order[kept:]])
    return ci.CoreNeurons(layers, offsets)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", half_slow(MODELS))
def test_neurons_are_ranked_by_contribution_and_the_others_stand_at_a_share_of_their_mean(name, share):
    params = random_model(MODELS[name])
    out = ci.generate(params, [PROMPTS[0]], ci.CoreConfig(beta=0.4, compensation=share), max_new_tokens=3)
    check_same_core(out.core, expected_core(params, prompt_activations(params, PROMPTS[0]), KEPT, share))
    given = ci.generate(params, [PROMPTS[0]], out.core, max_new_tokens=3)
    np.testing.assert_array_equal(given.tokens, out.tokens)
    assert given.core == out.core


def test_offsets_are_added_to_the_output_of_every_narrowed_layer():
    params = random_model(LLAMA)
    out = ci.generate(params, [PROMPTS[0]], ci.CoreConfig(beta=0.4, layers=(0.3, 1.0)), max_new_tokens=1)
    assert [offset is None for offset in out.core.offsets] == [True, False, False]
    narrowed, without = ci.compact(params, out.core), ci.compact(params, ci.CoreNeurons(out.core.layers))
    for layer, plain, offset in zip(narrowed.layers[1:], without.layers[1:], out.core.offsets[1:], strict=True):
        np.testing.assert_array_equal(layer.mlp.down.weight, plain.mlp.down.weight)
        assert plain.mlp.down.bias is None
        np.testing.assert_array_equal(layer.mlp.down.bias, offset)
    assert narrowed.layers[0].mlp.down.bias is None


def test_without_compensation_nothing_stands_for_the_others():
    params = random_model(OPT)
    out = ci.generate(params, [PROMPTS[0]], ci.CoreConfig(beta=0.4, compensation=0), max_new_tokens=1)
    assert out.core.offsets == (None, None, None)
    assert ci.generate(params, [PROMPTS[0]], ci.CoreConfig.paper(), max_new_tokens=1).core.offsets == (None,) * 3


def calibrated(params, core=ci.CoreConfig()):
    found = calibrate(params, Numbers(), documents(), None, SMALL)
    return replace(params, calibration=replace(found.calibration, core=core))


@pytest.mark.parametrize("name", first_quick(["llama", "opt"]))
def test_a_calibration_counts_as_tokens_of_the_prompt(name):
    params = calibrated(random_model(MODELS[name]))
    core = ci.CoreConfig(beta=0.4, rule=Contribution(prior_tokens=10), linear=False)
    out = ci.generate(params, [PROMPTS[0]], core, max_new_tokens=2)
    a = prompt_activations(params.weights, PROMPTS[0])
    kept = allocate(core, params.config, params.calibration.gains)
    check_same_core(out.core, expected_core(params, a, kept, 0.5, params.calibration.prior, 10.0))
    alone = ci.generate(params, [PROMPTS[0]], replace(core, rule=Contribution(prior_tokens=0)), max_new_tokens=2)
    check_same_core(alone.core, expected_core(params, a, kept, 0.5))
    votes = replace(ci.CoreConfig.paper(), beta=0.4)
    assert ci.generate(params, [PROMPTS[0]], votes, max_new_tokens=1).core == (
        ci.generate(params.weights, [PROMPTS[0]], votes, max_new_tokens=1).core
    )


def test_a_prior_is_what_one_half_of_the_texts_sums_to():
    params = random_model(OPT)
    found = calibrate(params, Numbers(), documents(), None, SMALL)
    order = np.random.default_rng(SMALL.seed).permutation(12)[:6]
    rows = [Numbers().encode(documents().texts[i]) for i in order]
    seen = [prompt_activations(params, row) for row in rows]
    for l, sums in enumerate(found.calibration.prior):
        norms = params.layers[l].mlp.down.input_norms()
        weight, total, squares = moments(np.concatenate([a[l] for a in seen]), np.asarray(norms, np.float64))
        assert sums["tokens"] == 6 * 20
        np.testing.assert_allclose(sums["weight"], weight, rtol=1e-4)
        np.testing.assert_allclose(sums["total"], total, rtol=1e-3, atol=1e-4)
        # A neuron that is hardly ever positive sums up rounding of its inputs, which has an absolute size.
        np.testing.assert_allclose(sums["squares"], squares, rtol=1e-4, atol=1e-9)
    assert found.calibration.core == ci.CoreConfig()
    assert found.results == []


def test_what_is_not_named_is_as_calibrated():
    params = calibrated(random_model(OPT), ci.CoreConfig(beta=0.25))
    out = ci.generate(params, [PROMPTS[0]], max_new_tokens=3)
    shares = allocate(params.calibration.core, OPT, params.calibration.gains)
    # 120 tokens are too few for linear neurons.
    assert out.stats.kept_neurons == shares
    assert 68 < sum(shares) <= 3 * 24
    dense = replace(params, calibration=replace(params.calibration, core=None))
    out = ci.generate(dense, [PROMPTS[0]], max_new_tokens=3)
    assert out.stats.method == "dense"


def test_a_model_that_nobody_has_measured_keeps_all_its_neurons():
    params = random_model(OPT)
    for core in ({}, {"core": "recommended"}):
        assert ci.generate(params, [PROMPTS[0]], **core, max_new_tokens=1).stats.method == "dense"
    asked = ci.generate(params, [PROMPTS[0]], ci.CoreConfig(), max_new_tokens=1)
    assert asked.stats.kept_neurons == (76, 34, 34)


def test_a_calibration_is_no_weight():
    params = random_model(OPT)
    with_one = calibrated(params)
    assert params_bytes(with_one) == params_bytes(params)
    assert [name for name, _ in named_leaves(with_one)] == [name for name, _ in named_leaves(params)]


def test_the_cheapest_setting_within_the_bound_is_taken():
    params = random_model(OPT)
    every = calibrate(params, Numbers(), documents(), Bound(max_kl=1e6), SMALL)
    assert every.calibration.core == ci.CoreConfig(beta=0.05)
    ends = {result["keep"]: result["kl"]["ci95"][1] for result in every.results}
    bound = ends[0.6]
    found = calibrate(params, Numbers(), documents(), Bound(max_kl=bound), SMALL)
    assert found.calibration.core == ci.CoreConfig(beta=min(keep for keep, end in ends.items() if end <= bound))
    assert found.facts["met"] is True
    ends = {result["keep"]: result["agreement"]["ci95"][0] for result in every.results}
    found = calibrate(params, Numbers(), documents(), Bound(min_agreement=ends[0.8]), SMALL)
    assert found.calibration.core.beta == min(keep for keep, end in ends.items() if end >= ends[0.8])


def test_a_bound_that_none_meets_means_all_neurons():
    found = calibrate(random_model(OPT), Numbers(), documents(), Bound(max_kl=1e-9), SMALL)
    assert found.calibration.core is None
    assert found.facts["met"] is False


OWN = Texts(continuation=4, texts=10)


@pytest.mark.parametrize("chat", first_quick([True, False]))
def test_a_model_answers_the_prompts_of_the_package_where_there_are_no_texts(chat, monkeypatch):
    monkeypatch.setattr(material, "TEMPERATURE", 0)
    monkeypatch.setattr(material, "LEARNT", 5)
    params = random_model(replace(OPT, eos_ids=()))
    read = own_answers(params, Lengths(chat), OWN)
    folder = Path(ci.__file__).parent / "assets" / "prompts"
    questions = (folder / "questions.txt").read_text(encoding="utf-8").splitlines()
    openings = (folder / "openings.txt").read_text(encoding="utf-8").split("\n<|endoftext|>\n")[:-1]
    opened = [90] if chat else []
    prompts = {(*opened, *Lengths().encode(text)) for text in questions} | {
        tuple(Lengths().encode(o)) for o in openings
    }
    [held_out] = read.held_out
    assert [len(held_out.rows), len(read.tried.rows), len(read.known.rows)] == [10, 16, 3 * 80]
    known = [tuple(row[:n]) for row, n in zip(read.known.rows, read.known.lengths, strict=True)]
    assert {text[:-5] for text in known} < prompts
    for excerpts in (read.tried, held_out):
        for row, context in zip(excerpts.rows, excerpts.context, strict=True):
            assert tuple(row[:context]) in prompts
    for row, context in zip(held_out.rows[:3], held_out.context, strict=False):
        answer = ci.generate(params, [row[:context]], None, max_new_tokens=5).tokens[0]
        np.testing.assert_array_equal(row[context : context + 5], answer)
    judged = {tuple(row[:context]) for row, context in zip(held_out.rows, held_out.context, strict=True)}
    assert judged.isdisjoint(text[:-5] for text in known)


def test_documents_beyond_what_a_prior_reads_are_for_training(monkeypatch):
    monkeypatch.setattr("coreinfer_jax.lab.evaluation.comparison.PRIOR_TOKENS", 60)
    few, more = (from_documents(documents(), Numbers(), SMALL, OPT, taught) for taught in (0, 10**6))
    assert few.beside == ()
    assert len(few.known.rows) + len(more.beside) == len(documents().texts) // 2
    judged = {tuple(row) for excerpts in more.held_out for row in excerpts.rows}
    long = {len(row) for row in judged}.pop()
    assert judged.isdisjoint(tuple(text[:long]) for text in more.beside)
    np.testing.assert_array_equal(few.known.rows, more.known.rows)


def test_answers_that_are_too_short_are_refused():
    ends_at_once = random_model(replace(OPT, eos_ids=tuple(range(101))))
    with pytest.raises(ci.CoreInferError, match="0 of 80 answers have more than 4 tokens"):
        own_answers(ends_at_once, Lengths(), OWN)


def test_prompts_that_a_model_has_no_room_for_are_left_out():
    small = random_model(replace(OPT, max_positions=20, eos_ids=()))
    read = own_answers(small, Lengths(), OWN)
    assert max(read.prompts) <= 20 - 5
    assert max(read.held_out[0].context) <= 20 - 5
    with pytest.raises(ci.CoreInferError, match="7 positions have no room for the prompts of the package"):
        own_answers(random_model(replace(OPT, max_positions=7)), Lengths(), OWN)


def test_every_calibration_of_the_package_can_be_read():
    for path in SHIPPED.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            L, (F,) = file.get_slice("gains").get_shape()[0], file.get_slice("layers.0.total").get_shape()
            D = file.get_slice("linear.0.directions").get_shape()[1]
            model = file.metadata()["model"]
        config = replace(OPT, num_layers=L, mlp_size=F, hidden_size=D)
        known = read_calibration(Path("nowhere"), config, lambda model=model: model)
        assert known is not None
        assert known.linear is not None
        assert read_facts(Path("nowhere"), config, lambda model=model: model) is not None
        assert read_calibration(Path("nowhere"), config, lambda: "another") is None
    assert path.name == "smollm2-135m-instruct-q4_1.safetensors"


def test_a_calibration_comes_with_the_package_for_a_model_that_does_not(tmp_path, monkeypatch):
    own = ci.convert("embedded:llama", tmp_path / "own")
    monkeypatch.setattr("coreinfer_jax.io.calibration_file.SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    bare, other = (ci.convert(f"embedded:{name}", tmp_path / f"bare-{name}") for name in ("llama", "opt"))
    shutil.move(bare / CALIBRATION, tmp_path / "shipped" / "llama.safetensors")
    (other / CALIBRATION).unlink()
    found, expected = ci.load(bare)[0].calibration, ci.load(own)[0].calibration
    np.testing.assert_array_equal(found.prior[0]["squares"], expected.prior[0]["squares"])
    assert found.core == expected.core
    assert ci.load(other)[0].calibration is None


@pytest.fixture(scope="module")
def stories(tmp_path_factory, data) -> Path:
    path = tmp_path_factory.mktemp("texts") / "stories.txt"
    lines = (data / "text" / "tinystories_val.txt").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line for line in lines if len(line) > 300)[:20_000] + "\n", encoding="utf-8")
    return path


SIZES = ("--texts", "4", "--prompt-tokens", "16", "--continuation", "16")


@pytest.fixture(scope="module")
def model(shallow, stories, tmp_path_factory) -> Path:
    """A directory with the cut-down LLaMA, and its calibration."""
    directory = ci.convert(shallow["llama"], tmp_path_factory.mktemp("model") / "llama")
    assert main(["calibrate", "--model", str(directory), "--data", str(stories), *SIZES]) == 0
    return directory


def test_calibrations_come_with_the_embedded_models_and_with_what_is_converted(tmp_path):
    model = ci.convert("embedded:llama", tmp_path / "llama")
    for name in ("embedded:opt", "embedded:llama", model):
        params, _ = ci.load(name)
        assert params.calibration.core == ci.CoreConfig()
        assert 65536 <= float(params.calibration.prior[0]["tokens"]) < 65536 + 1024
    assert ci.load(model, "float16")[0].calibration is not None


def test_the_command_calibrates_a_model_in_place(model, stories, capsys):
    arguments = ["calibrate", "--model", str(model), "--data", str(stories), *SIZES]
    assert main([*arguments, "--max-kl", "0.2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    within = [one["keep"] for one in found["settings"] if one["kl"]["ci95"][1] <= 0.2]
    assert found["core"]["beta"] == min(within)
    params, tokenizer = ci.load(model)
    assert params.calibration.core == ci.CoreConfig(beta=min(within))
    prompt = tokenizer.encode("Once upon a time")
    kept = list(params.calibration.core.widths(params))
    assert list(ci.generate(params, [prompt], max_new_tokens=2).stats.kept_neurons) == kept
    assert main(["generate", "Once", "--model", str(model), "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["kept_neurons"] == kept
    assert main(["info", str(model)]) == 0
    shares = ", ".join(f"{width / params.config.mlp_size:.0%}" for width in kept)
    told = capsys.readouterr().out
    linear = params.calibration.core.linear_layers(params)
    assert any(linear)
    beside = f"; 64 linear neurons each in {sum(linear)} of 2 layers"
    assert f"keep {min(within):g} ({shares}, layer by layer{beside}), from {stories.name}, within max_kl 0.2" in told
    assert main([*arguments, "--max-kl", "1e-9"]) == 0
    assert "No keep ratio stays within the bound, so the model goes on with all its neurons." in capsys.readouterr().out
    assert ci.generate(ci.load(model)[0], [prompt], max_new_tokens=2).stats.method == "dense"


def test_a_model_without_a_calibration_is_said_not_to_be_narrowed(model, tmp_path, capsys):
    directory = shutil.copytree(model, tmp_path / "mine")
    (directory / CALIBRATION).unlink()
    command = ["generate", "Once", "--model", str(directory), "--max-new-tokens", "2", "--json"]
    said = "[dense (not calibrated: 'coreinfer calibrate' finds how many neurons it can spare): 100% of"
    for options, method, noted in (([], "dense", True), (["--beta", "0.5"], "stability", False)):
        assert main([*command, *options]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["stats"]["method"] == method
        assert (said in printed.err) == noted
    assert main(["info", str(directory)]) == 0
    assert "none; all neurons are used" in capsys.readouterr().out


MISTAKES = {
    "no nats": (["--max-kl", "0"], "max_kl=0.0"),
    "nats that are none": (["--max-kl", "nan"], "max_kl=nan"),
    "all and more": (["--min-agreement", "1.5"], "min_agreement=1.5"),
    "too long": (["--continuation", "100000"], "exceed the model's"),
    "few texts": (["--prompt-tokens", "200", "--continuation", "56"], "are as long; give longer texts"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_get_one_line_and_leave_what_is_there(arguments, said, model, stories, capsys):
    before = (model / CALIBRATION).read_bytes()
    short = stories.with_name("short.txt")
    short.write_text("One day. The end.\nAnother day. The end.\n", encoding="utf-8")
    data = short if "few" in said or "longer" in said else stories
    assert main(["calibrate", "--model", str(model), "--data", str(data), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("coreinfer: error: ")
    assert said in error
    assert (model / CALIBRATION).read_bytes() == before


@pytest.mark.parametrize("json_too", first_quick([False, True]))
def test_a_model_is_calibrated_without_texts(model, tmp_path, capsys, monkeypatch, json_too):
    monkeypatch.setattr(material, "LEARNT", 5)
    monkeypatch.setattr(material, "ANSWERS", 1)
    prompts = material._prompts
    monkeypatch.setattr(material, "_prompts", lambda tokenizer: prompts(tokenizer)[::5])
    directory = shutil.copytree(model, tmp_path / "mine")
    (directory / CALIBRATION).unlink()
    small = ["--texts", "4", "--continuation", "4", "--max-kl", "1e6"]
    assert main(["calibrate", "--model", str(directory), *small, *(["--json"] if json_too else [])]) == 0
    out = capsys.readouterr().out
    core, facts = read_facts(directory, ci.load(directory)[0].config, str)
    assert core["beta"] == 0.05
    assert facts["data"] == "the model's own answers"
    assert min(facts["speed"][way] for way in ("all", "core")) > 0
    if json_too:
        assert json.loads(out)["facts"] == facts
        return
    assert re.search(
        r"\nIt costs \d+\.\d+ nats per token against the full model, whose choice it shares for \d+% of", out
    )
    assert f"A token takes {facts['speed']['core']:.3g} ms instead of {facts['speed']['all']:.3g}" in out
    assert main(["info", str(directory)]) == 0
    assert "from the model's own answers, within max_kl 1e+06; " in capsys.readouterr().out


def test_prompt_lengths_are_of_texts_in_a_file(model, capsys):
    assert main(["calibrate", "--model", str(model), "--prompt-tokens", "16"]) == 2
    assert "--prompt-tokens: is of texts in a file; add --data FILE" in capsys.readouterr().err


def test_an_embedded_model_is_not_written_into(stories, capsys):
    assert main(["calibrate", "--model", "embedded:opt", "--data", str(stories)]) == 2
    assert "embedded:opt: is calibrated, and part of the package; convert it" in capsys.readouterr().err


def rewritten(directory: Path, source: Path, change) -> Path:
    """A copy of a model whose calibration `change`(arrays, metadata) has been at."""
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    arrays = load_file(directory / CALIBRATION)
    with safe_open(directory / CALIBRATION, framework="numpy") as file:
        metadata = file.metadata()
    change(arrays, metadata)
    save_file(arrays, directory / CALIBRATION, metadata=metadata)
    return directory


DAMAGE = {
    "another model's": (lambda a, m: m.update(model="0123456789abcdef"), "is of the model with fingerprint"),
    "another version": (lambda a, m: m.update(version="9"), "this release reads versions 2 and 3"),
    "no setting": (lambda a, m: m.pop("core"), "its header is incomplete"),
    "a setting out of range": (lambda a, m: m.update(core='{"beta": 7, "layers": [0, 1]}'), "beta=7"),
    "no JSON": (lambda a, m: m.update(core="{"), "damaged calibration"),
    "a missing array": (lambda a, m: a.pop("layers.0.total"), "damaged calibration"),
    "no gains": (lambda a, m: a.pop("gains"), "damaged calibration"),
    "gains that rise": (lambda a, m: a.update(gains=a["gains"][:, ::-1].copy()), "gains that rise"),
    "facts that are none": (lambda a, m: m.update(facts='{"kept_neurons": 5}'), "damaged calibration"),
    "counts that are none": (
        lambda a, m: m.update(facts='{"kept_neurons": ["a"]}'),
        "numbers of neurons",
    ),
    "a bound that is none": (lambda a, m: m.update(facts='{"bound": {"max_kl": "a"}}'), "a bound, a time or a name"),
    "bounds that are a list": (lambda a, m: m.update(facts='{"bound": [1]}'), "damaged calibration"),
    "a time that is none": (lambda a, m: m.update(facts='{"speed": {"core": 1}}'), "damaged calibration"),
    "a number of many digits": (lambda a, m: m.update(facts='{"bound": {"max_kl": 1%s}}' % (400 * "0")), "damaged"),
    "facts nested deeply": (lambda a, m: m.update(facts="[" * 100_000), "nested too deeply"),
    "a setting nested deeply": (lambda a, m: m.update(core="[" * 100_000), "nested too deeply"),
    "numbers that are none": (lambda a, m: a["layers.0.total"].fill(np.nan), "damaged calibration"),
}


@pytest.mark.parametrize(("change", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_calibration_that_does_not_fit_is_refused(change, said, tmp_path, capsys):
    source = Path(ci.__file__).parent / "assets" / "llama"
    with pytest.raises(ci.CoreInferError, match=said):
        ci.load(rewritten(tmp_path, source, change))
    if "fingerprint" not in said:  # `info` tells of another model's too
        assert main(["info", str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", first_quick(["opt", "llama"]))
def test_a_model_with_a_layer_that_writes_nothing_is_calibrated(name, tmp_path):
    params = random_model(MODELS[name])
    silent = with_leaves(
        params, lambda leaf: dict(named_leaves(params))[leaf] * float(not leaf.startswith("layers.1.mlp.down"))
    )
    found = calibrated(silent).calibration
    assert not found.prior[1]["weight"].any()
    write_calibration(tmp_path, params.config, "model", found, {})
    again = read_calibration(tmp_path, params.config, lambda: "model")
    np.testing.assert_array_equal(again.gains, found.gains)
    given = {"max_new_tokens": 4, "core": ci.CoreConfig(beta=0.5)}
    ours, theirs = (
        ci.generate(replace(silent, calibration=one), [PROMPTS[0]], **given).tokens for one in (found, again)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_a_calibration_that_could_not_be_read_is_not_written(tmp_path):
    found = calibrated(random_model(OPT)).calibration
    (tmp_path / CALIBRATION).write_text("what was there")
    with pytest.raises(ci.CoreInferError, match="not written, because reading it back failed"):
        write_calibration(tmp_path, OPT, "model", replace(found, gains=found.gains[:, ::-1].copy()), {})
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(CALIBRATION, "what was there")]


def test_a_file_of_noise_is_refused(tmp_path, model):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / CALIBRATION).write_bytes(b"noise" * 100)
    with pytest.raises(ci.CoreInferError, match="damaged calibration"):
        ci.load(tmp_path)


OFFSETS = {
    "too few": ([[1, 2], None], [np.zeros(3)], "offsets for 1 layers"),
    "of a dense layer": ([[1, 2], None], [None, np.zeros(3)], "give none, the layer is dense"),
    "of rows": ([[1, 2]], [np.zeros((2, 3))], r"shape \(2, 3\)"),
    "no number": ([[1, 2]], [np.full(3, np.nan)], "NaN"),
}


@pytest.mark.parametrize(("layers", "offsets", "said"), OFFSETS.values(), ids=OFFSETS.keys())
def test_offsets_that_do_not_fit_are_refused(layers, offsets, said):
    with pytest.raises(ci.CoreInferError, match=said):
        ci.CoreNeurons(layers, offsets)


def test_offsets_of_another_size_are_refused_and_are_part_of_what_is_equal():
    one, other = ci.CoreNeurons([[1, 2]], [np.zeros(3)]), ci.CoreNeurons([[1, 2]])
    assert one != other
    with pytest.raises(ci.CoreInferError, match="offset of layer 0 has size 3"):
        ci.compact(random_model(replace(OPT, num_layers=1)), one)


def test_a_calibration_compiles_no_pass_anew():
    params = random_model(OPT)
    core = ci.CoreConfig(rule=Contribution(prior_tokens=0))
    ci.generate(params, [PROMPTS[0]], core, max_new_tokens=3)
    nothing = Calibration(({},) * OPT.num_layers, None, core)
    with traced() as messages:
        ci.generate(replace(params, calibration=nothing), [PROMPTS[0]], max_new_tokens=3)
    assert messages == []


def test_a_bad_calibration_can_be_made_anew(model, tmp_path, stories, capsys):
    directory = rewritten(tmp_path, model, lambda arrays, metadata: metadata.update(model="0" * 16))
    assert main(["calibrate", "--model", str(directory), "--data", str(stories), *SIZES]) == 0
    assert "\nkeep 0." in capsys.readouterr().out
    assert ci.load(directory)[0].calibration is not None


def test_a_16_bit_copy_keeps_its_calibration(tmp_path):
    copy = ci.convert("embedded:opt", tmp_path / "half", "float16")
    half, whole = (ci.load(model, "float32")[0].calibration for model in (copy, "embedded:opt"))
    np.testing.assert_array_equal(half.prior[3]["squares"], whole.prior[3]["squares"])


def test_another_vocabulary_is_refused_and_another_template_is_not(tmp_path):
    directory = ci.convert("embedded:opt", tmp_path / "mine")
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = {"chat_template": "{{ messages[0].content }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | template), encoding="utf-8")
    assert ci.load(directory)[0].calibration is not None
    vocabulary = directory / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(ci.CoreInferError, match="made with another tokenizer"):
        ci.load(directory)


def test_options_replace_what_was_calibrated(model, tmp_path, capsys):
    from coreinfer_jax.io.loading import open_model, stored_fingerprint

    directory = shutil.copytree(model, tmp_path / "mine")
    found = replace(ci.load(directory)[0].calibration, core=ci.CoreConfig(beta=0.3))
    config, tensors = open_model(directory)
    write_calibration(directory, config, stored_fingerprint(config, tensors), found, {})
    given = {
        ("--prior-tokens", "32"): ci.CoreConfig(beta=0.3),
        ("--beta", "0.5"): ci.CoreConfig(beta=0.5),
        ("--allocation", "equal"): ci.CoreConfig(beta=0.3, allocation="equal"),
    }
    params = ci.load(directory)[0]
    for options, core in given.items():
        assert (
            main(["generate", "The king", "--model", str(directory), "--max-new-tokens", "2", "--json", *options]) == 0
        )
        kept = json.loads(capsys.readouterr().out)["stats"]["kept_neurons"]
        assert kept == list(core.widths(params))


def test_narrowed_weights_carry_no_calibration():
    params = calibrated(random_model(OPT))
    core = ci.CoreNeurons([range(10)] * OPT.num_layers)
    assert ci.compact(params, core).calibration is None
    np.testing.assert_array_equal(ci.forward(params, [PROMPTS[0]]), ci.forward(params.weights, [PROMPTS[0]]))


@pytest.mark.parametrize("per_row", [True, False])
def test_batches_of_calibrated_models_are_chosen_row_by_row_or_together(per_row):
    params = calibrated(random_model(LLAMA))
    core = ci.CoreConfig(beta=0.4, per_row=per_row, rule=Contribution(prior_tokens=10), linear=False)
    prompts = [PROMPTS[0], PROMPTS[2]]
    out = ci.generate(params, prompts, core, max_new_tokens=2)
    a = [prompt_activations(params.weights, prompt) for prompt in prompts]
    kept = allocate(core, params.config, params.calibration.gains)
    if not per_row:
        together = [np.concatenate(layer) for layer in zip(*a, strict=True)]
        check_same_core(out.core, expected_core(params, together, kept, 0.5, params.calibration.prior, 10.0))
        return
    for b, own in enumerate(a):
        check_same_core(out.core.row(b), expected_core(params, own, kept, 0.5, params.calibration.prior, 10.0))


@pytest.mark.parametrize("dtype", first_quick(["bfloat16", "float16"]))
def test_16_bit_weights_decode_with_their_offsets(dtype):
    params = random_model(LLAMA, dtype=dtype)
    out = ci.generate(params, [PROMPTS[0]], ci.CoreConfig(beta=0.4), max_new_tokens=1)
    narrowed = ci.compact(params, out.core)
    assert narrowed.layers[0].mlp.down.bias.dtype == np.float32
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    expected = ci.forward(ci.compact(wide, out.core), [PROMPTS[0]])
    np.testing.assert_allclose(ci.forward(narrowed, [PROMPTS[0]]), expected, atol=0.03 * float(np.abs(expected).max()))
