"""What linear neurons save the embedded models at equal bytes: settings with and without them, on held-out texts."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import coreinfer_jax as ci
from benchmarks.environment import environment, read_results
from benchmarks.tables import made_on, markdown
from coreinfer_jax.lab.evaluation import Texts
from coreinfer_jax.lab.evaluation.comparison import Excerpts, compare_on, excerpts_of
from coreinfer_jax.lab.evaluation.fitting import learn
from coreinfer_jax.lab.evaluation.settings import without_prior
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.calibration import Calibration
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.corpus import Beginnings, Corpus
from coreinfer_jax.text.documents import read_documents

MODELS = ("embedded:llama", "embedded:opt")
# The files whose one half is learnt from and whose other half is judged by.
FILES = ("stories.txt", "prose.txt")
KEEPS = (0.1, 0.2, 0.4, 0.6)
TEXTS = Texts(prompt_tokens=(128,), continuation=64, texts=24)
# Of each kind that is learnt from: tokens of a text, and of all.
LEARNT_LENGTH, LEARNT_TOKENS = 256, 16384


def measure(texts: Path) -> Iterator[dict[str, Any]]:
    """One result per model.

    Raises:
        CoreInferError: texts that are not there.
    """
    for name in MODELS:
        params, tokenizer = ci.load(name, "float32")
        assert tokenizer is not None, "these models have tokenizers"
        yield environment() | {"model": name} | _of_model(params, tokenizer, [texts / file for file in FILES])


def _of_model(params: Params, tokenizer: Tokenizer, files: Sequence[Path]) -> dict[str, Any]:
    corpora = {file.name: Corpus(read_documents(file), tokenizer, TEXTS.seed) for file in files}
    known = [corpus.beginnings(LEARNT_LENGTH, LEARNT_TOKENS, half=0) for corpus in corpora.values()]
    judged: dict[str, Excerpts] = {}
    for name, corpus in corpora.items():
        [judged[name]] = excerpts_of(corpus.select(TEXTS.tokens, TEXTS.texts, half=1), TEXTS)
    read = Beginnings.of([row[:n].tolist() for one in known for row, n in zip(one.rows, one.lengths, strict=True)])
    began = perf_counter()
    sums, explained = learn(params, read)
    seconds = perf_counter() - began
    assert explained is not None, "there are many tokens"
    calibrated = replace(params, calibration=Calibration(sums, None, None, explained))
    prior = {without_prior(CoreConfig().ranking): sums}
    settings = [CoreConfig(beta=keep, allocation="equal", linear=linear) for keep in KEEPS for linear in (False, True)]
    kinds = {}
    for name, excerpts in judged.items():
        found = compare_on(calibrated, excerpts, settings, TEXTS.seed, prior)
        kinds[name] = [_figures(one, core.linear) for one, core in zip(found, settings, strict=True)]
    return {
        "linear_neurons": explained.size,
        "mlp_size": params.config.mlp_size,
        "learnt_tokens": int(read.lengths.sum()),
        "learning_seconds": seconds,
        "kinds": kinds,
    }


def _figures(result: dict[str, Any], linear: bool) -> dict[str, Any]:
    named = ("keep", "texts", "prompt_tokens", "bytes_per_token", "kl", "agreement", "perplexity")
    return {"linear": linear} | {name: result[name] for name in (*named, "linear_layers", "dense_perplexity")}


def table() -> str:
    """The newest result of each model, for docs/quality.md."""
    newest = {result["model"]: result for result in read_results("linear-neurons")}
    return "\n\n".join(_table(result) for result in newest.values()) or "No results yet."


def _table(result: dict[str, Any]) -> str:
    head = ["texts", *(f"keep {keep:g}: without, with" for keep in KEEPS)]
    rows = [head]
    for kind, figures in result["kinds"].items():
        found = {(one["keep"], one["linear"]): one for one in figures}
        rows.append([kind.removesuffix(".txt"), *(_cell(found[keep, False], found[keep, True]) for keep in KEEPS)])
    what = (
        f"{result['model']}: {result['linear_neurons']} linear neurons per layer beside {result['mlp_size']} others, "
        f"learnt from {result['learnt_tokens']} tokens in {result['learning_seconds']:.0f} s"
    )
    return f"{markdown(rows)}\n\n{what}; {made_on(result)}"


def _cell(without: dict[str, Any], beside: dict[str, Any]) -> str:
    """Both KL divergences, the second's share of the first, and how often both agree with the full model."""
    kl = [one["kl"]["mean"] for one in (without, beside)]
    agreement = [one["agreement"]["mean"] for one in (without, beside)]
    return f"{kl[0]:.3f}, {kl[1]:.3f} ({kl[1] / kl[0]:.0%}); {agreement[0]:.0%}, {agreement[1]:.0%}"
