"""What linear neurons without a calibration are worth on SmolLM2, at equal bytes, beside what such a model has today.

Their slopes are fitted to the prompt alone. Their directions are the best for the prompt, or come from the weights: the
leading ones of all rows of gate and up, each as long as what its neuron writes.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.chat_model import cell_of, figures_of, load_model
from benchmarks.environment import environment, read_results
from benchmarks.tables import made_on, markdown
from coreinfer_jax.lab.evaluation import Texts
from coreinfer_jax.lab.evaluation.comparison import bytes_per_token, excerpts_of, perplexity, summary
from coreinfer_jax.lab.evaluation.fitting import KEEP, Matrix, Products, fit, halved, made
from coreinfer_jax.lab.evaluation.measure import Measured
from coreinfer_jax.lab.evaluation.measure import measure as measured
from coreinfer_jax.lab.evaluation.settings import prior_of, without_prior
from coreinfer_jax.lab.reading import read_whole
from coreinfer_jax.model import MlpPass
from coreinfer_jax.model.weights import Layer, Params
from coreinfer_jax.sparsity.calibration import Calibration, Explained
from coreinfer_jax.sparsity.linear import LinearFit
from coreinfer_jax.sparsity.rules import Contribution
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.sparsity.votes import kept_neurons
from coreinfer_jax.text.corpus import Corpus
from coreinfer_jax.text.documents import read_documents

KEEPS = (0.4, 0.8)
# Linear neurons of each layer; a calibration has 128.
SIZES = (32, 64, 128)
# Of the fits, as a share of their inputs' mean variance. A calibration takes 0.01, over many more tokens.
RIDGE = 3.0
TEXTS = Texts(prompt_tokens=(128,), continuation=64, texts=6)
TODAY, CALIBRATED = "constants, as today", "linear neurons of a calibration"
PROMPT, WEIGHTS = "the prompt", "the weights"
_Result = dict[str, Any]
# Of one layer, x [T, D], a [T, F], and the weight of each token [T].
_Tokens = tuple[Matrix, Matrix, Matrix]


def measure(data: Path) -> Iterator[_Result]:
    """One result: every way on the same held-out texts.

    Raises:
        CoreInferError: texts that are not there, or SmolLM2 is not installed.
    """
    params, tokenizer = load_model()
    documents = read_documents(data / "text" / "wiki.txt")
    [excerpts] = excerpts_of(Corpus(documents, tokenizer, TEXTS.seed).select(TEXTS.tokens, TEXTS.texts, half=1), TEXTS)
    described = environment() | {"prompt_tokens": excerpts.length, "texts": len(excerpts.rows)}
    yield described | {"settings": compared(params, excerpts.rows, excerpts.length)}


def compared(params: Params, rows: np.ndarray, context: int) -> list[_Result]:
    """The figures of every way and keep ratio on texts `rows` [n, W] behind their first `context` tokens."""
    today = replace(params, calibration=None)
    directions = [leading(layer, max(SIZES)) for layer in params.layers]
    found: dict[tuple[str, float], list[Measured]] = {}
    losses, read = [], {}
    for text in rows:
        ways = {TODAY: today, CALIBRATED: params} | _fitted(today, text[:context], directions)
        for name, known in ways.items():
            settings = [_setting(known, keep) for keep in KEEPS]
            full, figures = measured(known, text[None], context, settings, prior=prior_of(known.calibration))
            for setting, own in zip(settings, figures, strict=True):
                found.setdefault((name, setting.beta), []).append(own)
                read[name, setting.beta] = bytes_per_token(known, setting)
        losses.append(full)
    dense = perplexity(np.concatenate(losses), TEXTS.seed)
    return [
        {"name": name}
        | figures_of(
            {"keep": keep, "bytes_per_token": read[name, keep], "dense_perplexity": dense}
            | summary(_joined(own), TEXTS.seed)
        )
        for (name, keep), own in found.items()
    ]


def _setting(params: Params, keep: float) -> CoreConfig:
    """The default at a keep ratio; without a calibration there is no prior."""
    if params.calibration is None:
        return CoreConfig(beta=keep, rule=without_prior(Contribution()))
    return CoreConfig(beta=keep)


def _joined(parts: list[Measured]) -> Measured:
    fields = ("kl", "agreement", "loss")
    return Measured(*(np.concatenate([getattr(one, field) for one in parts]) for field in fields))


def _fitted(params: Params, prompt: np.ndarray, directions: list[Matrix]) -> dict[str, Params]:
    """`params` with each kind of linear neurons that need no calibration, by the name of the way.

    `directions` are those of the weights, [r, D] of each layer.
    """
    inputs, activations = _read(params, jnp.asarray(prompt[None]))
    pairs = zip(params.layers, inputs, activations, strict=True)
    tokens = [weighted(layer, np.asarray(x, np.float64), np.asarray(a, np.float64)) for layer, x, a in pairs]
    layers = list(zip(params.layers, tokens, directions, strict=True))
    ways: dict[str, Params] = {}
    for size in SIZES:
        ways[f"{PROMPT}, {size}"] = _with_fits(params, [of_prompt(layer, own, size) for layer, own, _ in layers])
        ways[f"{WEIGHTS}, {size}"] = _with_fits(
            params, [onto(layer, own, given[:size]) for layer, own, given in layers]
        )
    return ways


def _with_fits(params: Params, fits: list[LinearFit]) -> Params:
    """`params` with linear neurons at every share of a layer, and a prior that says nothing."""
    nothing = jnp.zeros(params.config.mlp_size)
    sums = {"tokens": jnp.ones(()), "weight": jnp.zeros(()), "total": nothing, "squares": nothing}
    prior = (sums,) * params.config.num_layers
    return replace(params, calibration=Calibration(prior, None, None, Explained(tuple(fits), prior, up_to=1.0)))


@jax.jit
def _read(params: Params, tokens: Array) -> tuple[list[Array], list[Array]]:
    """Of each layer, what its MLP reads of tokens [1, T], [T, D], and its activations [T, F]."""

    def observe(l: int, layer: Layer, seen: MlpPass) -> tuple[tuple[Array, Array], Array]:
        return (seen.inputs[0], seen.activations[0]), jnp.isfinite(seen.activations).all()

    inputs, activations = zip(*read_whole(params, tokens, observe)[2], strict=True)
    return list(inputs), list(activations)


def weighted(layer: Layer, x: Matrix, a: Matrix) -> _Tokens:
    """A layer's tokens, each weighing as much as in the rule `Contribution`."""
    norms = np.asarray(layer.mlp.down.input_norms(), np.float64)
    return x, a, 1 / ((a * norms) ** 2).sum(axis=1)


def of_prompt(layer: Layer, tokens: _Tokens, size: int, ridge: float = RIDGE) -> LinearFit:
    """The fit of a calibration that has read the prompt alone."""
    x, a, w = tokens
    down = np.asarray(layer.mlp.down.weight, np.float32)
    products = Products(
        *(jnp.asarray(own, jnp.float32) for own in (w.sum(), w @ x, w @ a, (x.T * w) @ x, (x.T * w) @ a))
    )
    contributions = (w @ a**2) * (down.astype(np.float64) ** 2).sum(axis=0)
    kept = np.argsort(-contributions)[: kept_neurons(KEEP, len(contributions))]
    dropped = ~np.isin(np.arange(len(contributions)), kept)
    return fit(products, down, dropped[None], size, ridge)


def onto(layer: Layer, tokens: _Tokens, directions: Matrix, ridge: float = RIDGE) -> LinearFit:
    """Slopes and constants for `directions` [r, D] by least squares over the prompt."""
    x, a, w = tokens
    w = w / w.sum()
    placed = x @ directions.T
    mean, activation = w @ placed, w @ a
    centred = placed - mean
    spread = (centred.T * w) @ centred
    added = ridge * np.trace(spread) / len(spread) * np.eye(len(spread))
    slopes = np.linalg.solve(spread + added, (centred.T * w) @ (a - activation))
    halves = halved(directions, slopes)
    expected = x @ halves[0].astype(np.float64).T @ halves[1].astype(np.float64)
    return made(*halves, activation - w @ expected, np.asarray(layer.mlp.down.weight, np.float32))


def leading(layer: Layer, size: int) -> Matrix:
    """The directions [r, D] that gate and up read most of inputs that the norm before them has made equally large."""
    scale = np.asarray(layer.mlp_norm.scale, np.float64)
    norms = np.asarray(layer.mlp.down.input_norms(), np.float64)[:, None]
    rows = [own.weight for own in (layer.mlp.gate, layer.mlp.up) if own is not None]
    read = np.concatenate([np.asarray(weight, np.float64) * norms for weight in rows]) * scale
    _, vectors = np.linalg.eigh(read.T @ read)
    # Of an input without its scale: that would only make the same directions hard to tell apart.
    safe = np.where(np.abs(scale) < 1e-3, np.inf, scale)
    return vectors[:, : -size - 1 : -1].T / safe


def table() -> str:
    """The newest result, for docs/chat-model.md."""
    results = read_results("linear-fallback")
    if not results:
        return "No results yet."
    result = results[-1]
    found = {(own["name"], own["keep"]): own for own in result["settings"]}
    rows = [["what stands for neurons that are left out", *(f"keep {keep:g}" for keep in KEEPS)]]
    for name in dict.fromkeys(name for name, _ in found):
        rows.append([_title(name), *(_shown(found[name, keep]) for keep in KEEPS)])
    told = f"{result['texts']} texts, prompts of {result['prompt_tokens']} tokens, {TEXTS.continuation} tokens scored"
    return f"{markdown(rows)}\n\n{told}; {made_on(result)}"


def _title(name: str) -> str:
    source, _, size = name.partition(", ")
    return f"{size} linear neurons, directions from {source}" if source in (PROMPT, WEIGHTS) else name


def _shown(figures: _Result) -> str:
    """KL divergence with its interval, agreement, and what a token reads."""
    return f"{cell_of(figures)}, {figures['bytes_per_token'] / 1e6:.0f} MB"
