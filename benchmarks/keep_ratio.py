"""What each keep ratio costs the embedded models in perplexity, as in the paper and as recommended.

Prompts and continuations come from the documents that training held out. The full model reads the prompt; the
continuation, given token by token, is read on the prompt's core neurons over the prompt's cache, as in decoding.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import coreinfer_jax as ci
from benchmarks.environment import environment
from coreinfer_jax.lab.evaluation import Texts, evaluate
from coreinfer_jax.lab.evaluation.settings import prior_of, without_prior
from coreinfer_jax.lab.training.windows import read_text
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import Params, weight_bytes_per_step
from coreinfer_jax.sparsity.votes import kept_neurons
from coreinfer_jax.text.documents import Documents

FILES = ("stories.txt", "prose.txt")
FLOAT32 = jnp.dtype("float32")
KEEPS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
TEXTS = Texts(prompt_tokens=(16, 64, 256), continuation=128, texts=64)


def measure(texts: Path) -> dict[str, Any]:
    """Perplexities of both embedded models over held-out documents of the files in `texts`."""
    return environment() | {
        "continuation_tokens": TEXTS.continuation,
        "models": {name: _model(name, texts) for name in ("opt", "llama")},
    }


def _model(name: str, texts: Path) -> dict[str, Any]:
    params, tokenizer = ci.load(f"embedded:{name}", "float32")
    assert tokenizer is not None, "the embedded models have tokenizers"
    assert params.calibration is not None, "the embedded models are calibrated"
    documents = tuple(document for file in FILES for _, document in read_text(texts / file).held_out)
    held_out = Documents("held out", "", documents)
    usual = ci.CoreConfig()
    alone = replace(usual, rule=without_prior(usual.ranking))
    prior = prior_of(params.calibration)
    results = {
        "paper": evaluate(params.weights, tokenizer, held_out, _at_all_keeps(ci.CoreConfig.paper()), TEXTS),
        "recommended": evaluate(params.weights, tokenizer, held_out, _at_all_keeps(alone), TEXTS),
        "calibrated": evaluate(params, tokenizer, held_out, _at_all_keeps(usual), TEXTS, prior=prior),
    }
    return {
        "fingerprint": fingerprint(params),
        "texts": results["paper"][0]["texts"],
        "bytes_share": {str(keep): _bytes_share(params, keep) for keep in KEEPS},
        "perplexity": {str(n): _of_length(results, n) for n in TEXTS.prompt_tokens},
    }


def _at_all_keeps(core: ci.CoreConfig) -> list[ci.CoreConfig]:
    return [replace(core, beta=keep) for keep in KEEPS]


def _bytes_share(params: Params, keep: float) -> float:
    """Weight bytes of a step on core neurons, as a share of the full model's."""
    narrowed = abstract_params(replace(params.config, mlp_size=kept_neurons(keep, params.config.mlp_size)), FLOAT32)
    return weight_bytes_per_step(narrowed, 1) / weight_bytes_per_step(abstract_params(params.config, FLOAT32), 1)


def _of_length(results: dict[str, list[dict[str, Any]]], length: int) -> dict[str, Any]:
    """Perplexity after prompts of `length` tokens: dense, and of each way by keep ratio."""
    perplexity: dict[str, Any] = {}
    for name, found in results.items():
        of_length = [result for result in found if result["prompt_tokens"] == length]
        perplexity["dense"] = of_length[0]["dense_perplexity"]["mean"]
        perplexity[name] = {str(result["keep"]): result["perplexity"]["mean"] for result in of_length}
    return perplexity
