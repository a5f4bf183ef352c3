"""What linear neurons save beside the neurons that a prompt's tokens vote for, at equal bytes, on held-out texts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import coreinfer_jax as ci
from benchmarks.environment import environment, read_results
from benchmarks.linear_neurons import FILES, MODELS
from benchmarks.tables import made_on, markdown
from coreinfer_jax.lab.evaluation.comparison import interval
from coreinfer_jax.lab.reading import batches
from coreinfer_jax.lab.training.windows import read_text
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choosers import Core
from coreinfer_jax.sparsity.similarity import Auto
from coreinfer_jax.text.corpus import Corpus
from coreinfer_jax.text.documents import Documents

KEEPS = (0.2, 0.4, 0.6, 0.8)
TEXTS, PROMPT, CONTINUATION, ROWS, SEED = 48, 64, 64, 8, 0
# Without groups, `Auto` keeps each prompt's own most voted neurons.
WAYS = {"votes": False, "votes, linear neurons": True}
_Result = dict[str, Any]


def measure(texts: Path) -> Iterator[_Result]:
    """One result per model.

    Raises:
        CoreInferError: texts that are not there.
    """
    documents = tuple(document for file in FILES for _, document in read_text(texts / file).held_out)
    for name in MODELS:
        params, tokenizer = ci.load(name, "float32")
        assert tokenizer is not None, "the embedded models have tokenizers"
        chosen = Corpus(Documents("held out", "", documents), tokenizer, SEED).select(PROMPT + CONTINUATION, TEXTS)
        yield environment() | {"model": name} | of_model(params, chosen.rows)


def of_model(params: Params, rows: np.ndarray) -> _Result:
    """By how many nats tokens of texts [n, PROMPT + CONTINUATION] are less probable than for the full model."""
    full = _losses(params, rows, None)
    figures = [
        {"name": name, "keep": keep}
        | {"lost": interval(_losses(params, rows, Auto(beta=keep, linear=linear)) - full, SEED)}
        for keep in KEEPS
        for name, linear in WAYS.items()
    ]
    return {"texts": len(rows), "prompt_tokens": PROMPT, "settings": figures}


def _losses(params: Params, rows: np.ndarray, core: Core) -> np.ndarray:
    """The mean loss of each text's continuation, [n]."""
    found: list[float] = []
    for chosen, real in batches(len(rows), ROWS, "scoring"):
        prompts, rest = rows[chosen, :PROMPT], rows[chosen, PROMPT : PROMPT + CONTINUATION]
        scores = ci.score_continuations(params, prompts, rest, core)
        found += [-float(own.mean()) for own in scores.logprobs][:real]
    return np.array(found)


def table() -> str:
    """The newest result of each model, for docs/quality.md."""
    newest = {result["model"]: result for result in read_results("linear-votes")}
    if not newest:
        return "No results yet."
    rows = [["model, neurons kept", *WAYS]]
    for model, result in newest.items():
        found = {(own["name"], own["keep"]): own["lost"] for own in result["settings"]}
        rows += [[f"{model}, {keep:.0%}", *(_cell(found[name, keep]) for name in WAYS)] for keep in KEEPS]
    first = next(iter(newest.values()))
    told = f"{first['texts']} held-out texts, prompts of {first['prompt_tokens']} tokens, {CONTINUATION} scored"
    return f"{markdown(rows)}\n\n{told}; {made_on(*newest.values())}"


def _cell(lost: _Result) -> str:
    low, high = lost["ci95"]
    return f"{lost['mean']:.3f} ({low:.3f} .. {high:.3f})"
