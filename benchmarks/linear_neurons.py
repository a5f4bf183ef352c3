"""What linear neurons save the embedded models, as calibrated, at equal bytes: with and without, on held-out texts."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import coreinfer_jax as ci
from benchmarks.environment import environment, read_results
from benchmarks.tables import made_on, markdown
from coreinfer_jax.lab.evaluation import Texts, evaluate
from coreinfer_jax.lab.evaluation.settings import prior_of
from coreinfer_jax.lab.training.windows import read_text
from coreinfer_jax.sparsity.calibration import calibration_of
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.text.documents import Documents

MODELS = ("embedded:opt", "embedded:llama")
# Training held some of their documents out, and a calibration reads what training read.
FILES = ("stories.txt", "prose.txt")
KEEPS = (0.1, 0.2, 0.4, 0.6, 0.8)
OURS = "linear neurons"
WAYS: Mapping[str, Callable[[float], CoreConfig]] = {
    "constants, layers alike": lambda keep: CoreConfig(beta=keep, allocation="equal", linear=False),
    "constants": lambda keep: CoreConfig(beta=keep, linear=False),
    OURS: lambda keep: CoreConfig(beta=keep),
}
TEXTS = Texts(prompt_tokens=(64,), continuation=64, texts=48)


def measure(texts: Path) -> Iterator[dict[str, Any]]:
    """One result per model.

    Raises:
        CoreInferError: texts that are not there.
    """
    documents = tuple(document for file in FILES for _, document in read_text(texts / file).held_out)
    held_out = Documents("held out", "", documents)
    settings = {(name, keep): way(keep) for name, way in WAYS.items() for keep in KEEPS}
    for name in MODELS:
        params, tokenizer = ci.load(name, "float32")
        calibration = calibration_of(params)
        assert tokenizer is not None, "the embedded models have tokenizers"
        assert calibration is not None, "the embedded models are calibrated"
        made = environment()
        found = evaluate(params, tokenizer, held_out, list(settings.values()), TEXTS, prior=prior_of(calibration))
        figures = [{"name": way} | _figures(result) for (way, _), result in zip(settings, found, strict=True)]
        yield made | {"model": name, "prompt_tokens": TEXTS.prompt_tokens[0], "settings": figures}


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    named = ("keep", "texts", "bytes_per_token", "kl", "agreement", "perplexity", "linear_layers", "dense_perplexity")
    return {name: result[name] for name in named}


def table() -> str:
    """The newest result of each model, for docs/quality.md."""
    newest = {result["model"]: result for result in read_results("linear-neurons") if "settings" in result}
    rows = [["model, neurons kept", *WAYS, "layers with linear neurons"]]
    for model, result in newest.items():
        found = {(one["name"], one["keep"]): one for one in result["settings"]}
        for keep in KEEPS:
            own = [found[way, keep] for way in WAYS]
            shown = (f"{one['kl']['mean']:.3f}, {one['agreement']['mean']:.0%}" for one in own)
            rows.append([f"{model}, {keep:.0%}", *shown, f"{own[-1]['linear_layers']}"])
    first = next(iter(newest.values()), None)
    if first is None:
        return "No results yet."
    told = f"{first['settings'][0]['texts']} held-out texts, prompts of {first['prompt_tokens']} tokens"
    return f"{markdown(rows)}\n\n{told}; {made_on(*newest.values())}"
