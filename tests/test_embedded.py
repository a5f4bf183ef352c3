"""The models that come with the package: against transformers, their own card, and the texts they have not seen."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import coreinfer_jax as ci
from benchmarks.report import newest
from coreinfer_jax.model.fingerprint import fingerprint
from tests.support import first_quick

ASSETS = Path(ci.__file__).parent / "assets"
NAMES = ["opt", "llama"]
PROMPT = "Once upon a time, there was a little"


def facts(name: str) -> dict:
    return json.loads((ASSETS / name / "training.json").read_text(encoding="utf-8"))


@pytest.mark.torch
@pytest.mark.parametrize("name", first_quick(NAMES))
def test_transformers_agrees(name: str) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    params, tokenizer = ci.load(f"embedded:{name}", "float32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float32).eval()
    prompt = tokenizer.encode(PROMPT)
    with torch.no_grad():
        generated = reference.generate(
            torch.tensor([prompt]), max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0].tolist()
        expected = reference(torch.tensor([generated])).logits.numpy()
    assert np.abs(np.asarray(ci.forward(params, [generated])) - expected).max() < 1e-4
    assert ci.generate(params, [prompt], None, max_new_tokens=60).tokens[0].tolist() == generated[len(prompt) :]


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name: str) -> None:
    config = ci.load(f"embedded:{name}")[0].config
    assert sum(file.stat().st_size for file in (ASSETS / name).iterdir()) <= 16e6
    with safe_open(ASSETS / name / "model.safetensors", framework="numpy") as stored:
        slices = [stored.get_slice(key) for key in stored.keys()]  # noqa: SIM118
        assert {part.get_dtype() for part in slices} == {"BF16"}
        assert 4e6 < sum(np.prod(part.get_shape()) for part in slices) < 6e6
    assert config.num_layers >= 6
    assert config.mlp_size >= 4 * config.hidden_size
    assert config.max_positions == 1024
    assert facts(name)["recipe"]["sequence"] == 1024


def test_the_default_is_the_relu_model() -> None:
    params, _ = ci.load()
    assert params.config == ci.load("embedded:opt")[0].config
    assert params.config.activation == "relu"


def test_another_name_is_refused() -> None:
    with pytest.raises(ci.CoreInferError, match="embedded:gpt: no such embedded model; there are embedded:llama, emb"):
        ci.load("embedded:gpt")


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_the_stated_loss_is_measured_again(name: str, number: int, real_data: Path) -> None:
    """From the raw documents, by this test's own code: 32 windows spread evenly over all that was held out."""
    stated = facts(name)
    file = stated["texts"][number]
    params, tokenizer = ci.load(f"embedded:{name}", stated["recipe"]["dtype"])
    documents = (real_data / "text" / file["file"]).read_text(encoding="utf-8").split("\n<|endoftext|>\n")
    bos, (eos,) = params.config.bos_id, params.config.eos_ids
    tokens: list[int] = []
    for entry in file["held_out"]:
        text = documents[entry["document"]].strip("\n")
        assert text.startswith(entry["begins"])
        tokens += tokenizer.encode(text) + ([] if eos == bos else [eos])
    whole = len(tokens) // 1024
    chosen = sorted({int(i) for i in np.linspace(0, whole - 1, min(whole, 32))})
    losses = [_loss(params, jnp.array([bos, *tokens[i * 1024 : (i + 1) * 1024]])) for i in chosen]
    assert np.mean(losses) == pytest.approx(stated["held_out"][file["file"]]["nats_per_token"], abs=2e-3)


def _loss(params: ci.Params, window: jax.Array) -> float:
    log_probability = jax.nn.log_softmax(ci.forward(params, window[None, :-1])[0])
    return -float(log_probability[jnp.arange(1024), window[1:]].mean())


def test_the_card_credits_every_source_and_names_what_was_held_out(real_data: Path) -> None:
    card = (ASSETS / "MODEL_CARD.md").read_text(encoding="utf-8")
    sources = (real_data / "text" / "SOURCES.md").read_text(encoding="utf-8")
    rows = [row.split("|") for row in sources.splitlines() if row.startswith(("| stories.txt", "| prose.txt"))]
    assert len(rows) > 100
    for _, file, repository, path, *_ in rows:
        assert repository.split("@")[0].strip() in card, repository
        assert path.strip() in card, (file, path)
    assert facts("opt")["texts"] == facts("llama")["texts"]
    for text in facts("opt")["texts"]:
        for entry in text["held_out"]:
            assert f"| {text['file']} | {entry['document']} |" in card


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stated_names_no_machine(name: str) -> None:
    assert not re.search(r'"/|[A-Z]:\\', (ASSETS / name / "training.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("result", ["first-run", "keep-ratio"])
def test_results_are_those_of_these_models(result: str, name: str) -> None:
    params, _ = ci.load(f"embedded:{name}", "float32")
    assert newest(result)["models"][name]["fingerprint"] == fingerprint(params)


def test_the_default_keep_ratio_is_the_one_the_measurement_supports() -> None:
    """The smallest that raises the perplexity of neither model by a fifth, on prompts of 64 tokens or more."""
    measured = [
        perplexity for model in newest("keep-ratio")["models"].values() for perplexity in model["perplexity"].values()
    ]
    assert len(measured) == 6
    longer = [perplexity for i, perplexity in enumerate(measured) if i % 3 > 0]
    ways = ("recommended", "calibrated")
    good = [
        float(keep)
        for keep in longer[0]["recommended"]
        if all(p[way][keep] < 1.2 * p["dense"] for p in longer for way in ways)
    ]
    assert ci.CoreConfig().beta == min(good)


def test_the_first_run_makes_english() -> None:
    """Most words of the README's command are words of the language: dense, and with core neurons."""
    params, tokenizer = ci.load()
    prompt = tokenizer.encode(PROMPT)
    for core in (None, ci.CoreConfig()):
        text = tokenizer.decode(ci.generate(params, [prompt], core, max_new_tokens=60).tokens[0].tolist())
        words = re.findall(r"[a-z']+", text.lower())
        assert len(words) > 20
        assert np.mean([word in COMMON.split() for word in words]) > 0.5, text


COMMON = """
a about after again all am an and any are as at away be been before being but by came can come could day did do
down for from gave girl go good great had has have he heard her here him his house how i if in into is it king
know let like little long look made man many may me men mother must my never no not now of off old on once one
or other our out over people poor princess queen said saw say see she should so some son such take than that the
their them then there they this time to told too took two under until up upon us very was water way we well went
were what when where which who will with woman would you young your boy father brother sister took
"""
