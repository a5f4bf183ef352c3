"""What papers on leaving neurons out measure, repeated on SmolLM2 beside their own figures.

The perplexity of WikiText-2 at the sparsities of TEAL and WINA, and GLASS's protocol, whose reference is what the full
model writes by itself.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import coreinfer_jax as ci
from benchmarks import chat_model
from benchmarks.environment import environment, read_results
from benchmarks.tables import made_on, markdown
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.evaluation import PerToken, Texts
from coreinfer_jax.lab.evaluation.comparison import (
    bytes_per_token,
    compare_on,
    excerpts_of,
    interval,
    perplexity,
)
from coreinfer_jax.lab.evaluation.free_running import repetition
from coreinfer_jax.lab.evaluation.material import prompt_halves
from coreinfer_jax.lab.evaluation.measure import collect
from coreinfer_jax.lab.evaluation.passes import Reading, losses, read
from coreinfer_jax.lab.evaluation.settings import Setting, kept_by, prior_of
from coreinfer_jax.model import extend, observe_nothing, unembed
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.calibration import calibration_of
from coreinfer_jax.sparsity.neurons import CoreNeurons
from coreinfer_jax.sparsity.rules import MOST_TOKENS, Contribution, Griffin, Sums, places
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.corpus import Beginnings, Corpus
from coreinfer_jax.text.documents import Documents, read_utf8

PARTS = WIKITEXT_PART, OWN_PART = ("wikitext", "own-text")
# The share of the neurons that is left out.
SPARSITIES = (0.25, 0.4, 0.5, 0.65)
WIKITEXT = Texts(prompt_tokens=(256,), continuation=64, texts=8)
# CATS reads the whole gate to find a token's neurons. Here it keeps fewer of them, so that the gate counts.
COUNTED = "each token its own (CATS), its whole gate counted"
OURS = chat_model.OURS
FIXED = ("votes (the paper)", "GRIFFIN", chat_model.BEFORE, OURS)
TOKENWISE = ("each token its own (TEAL)", "each token its own (WINA)", "each token its own (CATS)")
RULES: dict[str, Callable[[float], Setting]] = {
    **{name: chat_model.RULES[name] for name in (*FIXED, *TOKENWISE)},
    COUNTED: lambda keep: PerToken(rule="token-gate", beta=(3 * keep - 1) / 2),
}

# GLASS's protocol: the share of neurons that is kept, tokens of the full model's own text, how many of these texts are
# judged by and how many are learnt from, and over how many of the full model's most probable tokens.
KEEP, NEW, JUDGED, LEARNT, TOP = 0.5, 256, 8, 4, 100
ROWS = 8
LOCAL, GLOBAL, FUSED = "GRIFFIN: the prompt alone", "global: other texts alone", "ranks of both (GLASS)"
CORES: dict[str, CoreConfig] = {
    "votes (the paper)": replace(CoreConfig.paper(), beta=KEEP),
    "constants, the calibration alone": CoreConfig(
        beta=KEEP, rule=Contribution(prior_tokens=MOST_TOKENS), allocation="equal", linear=False
    ),
    chat_model.BEFORE: CoreConfig(beta=KEEP, allocation="equal", linear=False),
    OURS: CoreConfig(beta=KEEP),
}
_Result = dict[str, Any]
_Text = tuple[list[int], list[int]]

# What the papers print: method, model, measure, with all neurons, and at SPARSITIES; None where it is not known here.
PUBLISHED: tuple[tuple[str, str, str, float, tuple[float | None, ...]], ...] = (
    ("TEAL", "LLaMA-2-7B", "perplexity", 5.07, (5.09, 5.22, 5.43, None)),
    ("TEAL", "LLaMA-3-8B", "perplexity", 5.87, (5.94, 6.21, 6.67, 9.06)),
    ("TEAL, as WINA's authors ran it", "LLaMA-2-7B", "accuracy, %", 54.34, (54.11, 52.49, 50.51, 44.21)),
    ("WINA", "LLaMA-2-7B", "accuracy, %", 54.34, (54.42, 52.83, 51.76, 45.82)),
    ("TEAL, as WINA's authors ran it", "LLaMA-3-8B", "accuracy, %", 66.38, (65.58, 62.65, 58.51, 45.36)),
    ("WINA", "LLaMA-3-8B", "accuracy, %", 66.38, (66.00, 63.20, 59.57, 47.77)),
)


def measure(data: Path, parts: Sequence[str]) -> Iterator[_Result]:
    """One result of each part.

    Raises:
        CoreInferError: texts that are not there, or SmolLM2 is not installed.
    """
    return of_model(*chat_model.load_model(), data / "text" / "wikitext2_test.txt", parts)


def of_model(params: Params, tokenizer: Tokenizer, wikitext: Path, parts: Sequence[str]) -> Iterator[_Result]:
    """The results of a calibrated model."""
    measured = {
        WIKITEXT_PART: lambda: _on_articles(params, tokenizer, read_articles(wikitext)),
        OWN_PART: lambda: _on_own_text(params, tokenizer),
    }
    for part in parts:
        yield environment() | {"kind": part} | measured[part]()


def read_articles(path: Path) -> Documents:
    """The articles of WikiText's form, which titles between single equals signs begin."""
    content, digest = read_utf8(path)
    articles = re.split(r"\n(?= = [^=\n]+ = \n)", content)
    return Documents(path.name, digest, tuple(article for article in articles if article.strip()))


def _on_articles(params: Params, tokenizer: Tokenizer, articles: Documents) -> _Result:
    """Every rule at every sparsity, on the beginnings of articles."""
    [excerpts] = excerpts_of(
        Corpus(articles, tokenizer, WIKITEXT.seed).select(WIKITEXT.tokens, WIKITEXT.texts), WIKITEXT
    )
    settings = {(name, left_out): rule(1 - left_out) for name, rule in RULES.items() for left_out in SPARSITIES}
    prior = prior_of(calibration_of(params))
    found = compare_on(params, excerpts, list(settings.values()), WIKITEXT.seed, prior)
    figures = [
        {"name": name, "left_out": left_out}
        | chat_model.figures_of(one)
        | {"bytes_per_token": _bytes_read(params, name, settings[name, left_out])}
        for (name, left_out), one in zip(settings, found, strict=True)
    ]
    sizes = {"prompt_tokens": excerpts.length, "continuation": WIKITEXT.continuation, "texts": len(excerpts.rows)}
    return sizes | {"settings": figures}


def _bytes_read(params: Params, name: str, setting: Setting) -> int:
    """Bytes of weights for a token: of the gate all, where that counts."""
    read_by = bytes_per_token(params, setting)
    if name != COUNTED:
        return read_by
    left_out = params.config.mlp_size - kept_by(setting, params)
    return read_by + int(left_out.sum()) * params.config.hidden_size * params.dtype.itemsize


def _on_own_text(params: Params, tokenizer: Tokenizer) -> _Result:
    """What each way to choose half of the neurons makes of the full model's own greedy texts."""
    known, judged = prompt_halves(params, tokenizer, chat_model.TEXTS)
    learnt = _written(params, known, LEARNT)
    [prior] = collect(params, Beginnings.of([[*prompt, *text] for prompt, text in learnt]), [Griffin()]).values()
    texts = _written(params, judged, JUDGED)
    found: dict[str, list[np.ndarray]] = {}
    full: list[np.ndarray] = []
    width = max(len(prompt) for prompt, _ in texts) + NEW
    for prompt, text in texts:
        reading, following = _read(params, prompt, text, width)
        full.append(np.asarray(losses(reading.logits, following))[0])
        for name, core in _cores(params, prompt, reading, list(prior)).items():
            logits = _continued(ci.compact(params, core).weights, reading, jnp.asarray([text[:NEW]], jnp.int32))
            found.setdefault(name, []).append(np.asarray(_differences(reading.logits, logits, following))[:, 0])
    seed = chat_model.TEXTS.seed
    return {
        "prompt_tokens": float(np.mean([len(prompt) for prompt, _ in texts])),
        "continuation": NEW,
        "texts": len(texts),
        "learnt_texts": len(learnt),
        "keep": KEEP,
        "top": TOP,
        "repetition": float(np.mean([repetition(text) for _, text in texts])),
        "dense_perplexity": perplexity(np.stack(full), seed),
        "settings": [{"name": name} | _summary(np.stack(each, axis=1), seed) for name, each in found.items()],
    }


def _written(params: Params, prompts: Sequence[list[int]], count: int) -> list[_Text]:
    """The first `count` prompts to which the full model writes more than NEW tokens, with these.

    Raises:
        CoreInferError: fewer than two.
    """
    long: list[_Text] = []
    for first in range(0, len(prompts), ROWS):
        chosen = prompts[first : first + ROWS]
        out = ci.generate(params, chosen, None, max_new_tokens=NEW + 1, eos_ids=params.config.eos_ids)
        rows = zip(chosen, out.tokens, out.lengths, strict=True)
        long += [(prompt, row.tolist()) for prompt, row, length in rows if length == NEW + 1]
        if len(long) >= count:
            return long[:count]
    if len(long) < 2:
        raise CoreInferError(f"{len(long)} of the model's own texts have more than {NEW} tokens; two are needed")
    return long


def _read(params: Params, prompt: list[int], text: list[int], width: int) -> tuple[Reading, Array]:
    """The full model over a prompt and its text, with GRIFFIN's sums over the prompt; the tokens that are foretold."""
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(prompt) + NEW] = [*prompt, *text[:NEW]]
    of_prompt = np.arange(width)[None, :] < len(prompt)
    before, after = (Griffin().observer(counted, params.config.mlp_size) for counted in (of_prompt, ~of_prompt))
    contexts = jnp.asarray([len(prompt)], jnp.int32)
    reading = read(params.weights, jnp.asarray(tokens), contexts, [(before, after)], scored=NEW)
    return reading, jnp.asarray([text[1 : NEW + 1]], jnp.int32)


def _cores(params: Params, prompt: list[int], reading: Reading, prior: Sequence[Sums]) -> dict[str, CoreNeurons]:
    """By name, the core neurons of a prompt."""
    own = [_places(before) for [(before, _)] in reading.sums]
    others = [_places({name: one[None] for name, one in sums.items()}) for sums in prior]
    ranks = {LOCAL: own, GLOBAL: others, FUSED: [a + b for a, b in zip(own, others, strict=True)]}
    kept = kept_by(CoreConfig(beta=KEEP, allocation="equal", linear=False), params)
    by_ranks = {name: CoreNeurons(map(lowest, each, kept)) for name, each in ranks.items()}
    chosen = {name: ci.generate(params, [prompt], core, max_new_tokens=1).core for name, core in CORES.items()}
    return by_ranks | {name: core.row(0) for name, core in chosen.items() if core is not None}


def _places(sums: Sums) -> np.ndarray:
    """Each neuron's place in GRIFFIN's order, int [F]; of sums [1, F], which its score is without the norms."""
    return np.asarray(places(sums["squares"]))[0]


def lowest(ranks: np.ndarray, kept: int) -> np.ndarray:
    """The `kept` neurons of the lowest `ranks` [F], ascending; ties to the lower index."""
    return np.sort(np.argsort(ranks, kind="stable")[:kept]).astype(np.int32)


@jax.jit
def _continued(narrowed: Params, reading: Reading, rest: Array) -> Array:
    """Logits [B, T, V] of narrowed weights over `rest` [B, T], behind the context that the full model read."""
    hidden, _, _ = extend(narrowed, rest, reading.cache, reading.contexts, observe_nothing)
    return unembed(narrowed, hidden)


@jax.jit
def _differences(full: Array, narrowed: Array, following: Array) -> Array:
    """KL divergence, that over the full model's TOP tokens alone, agreement and loss: float32 [4, B, T]."""
    most, which = lax.top_k(full, TOP)
    return jnp.stack(
        [
            divergence(full, narrowed),
            divergence(most, jnp.take_along_axis(narrowed, which, axis=-1)),
            (full.argmax(axis=-1) == narrowed.argmax(axis=-1)).astype(jnp.float32),
            losses(narrowed, following),
        ]
    )


def divergence(full: Array, narrowed: Array) -> Array:
    """KL(full || narrowed) of the distributions over the last axis of logits, in nats."""
    own, other = jax.nn.log_softmax(full), jax.nn.log_softmax(narrowed)
    return jnp.sum(jnp.exp(own) * (own - other), axis=-1)


def _summary(differences: np.ndarray, seed: int) -> _Result:
    """Means and intervals over texts of `differences` [4, n, T]."""
    kl, top_kl, agreement, loss = differences
    means = {"kl": kl, "top_kl": top_kl, "agreement": agreement}
    return {name: interval(own.mean(axis=1), seed) for name, own in means.items()} | {
        "perplexity": perplexity(loss, seed)
    }


def newest(kind: str) -> _Result:
    """The newest result of a kind."""
    return [result for result in read_results("published") if result["kind"] == kind][-1]


def wikitext() -> str:
    """Perplexity on WikiText-2 by sparsity, and what papers print for other models."""
    result = newest(WIKITEXT_PART)
    found = {(own["name"], own["left_out"]): own for own in result["settings"]}
    dense = result["settings"][0]["dense_perplexity"]["mean"]
    left_out = [f"{share:.0%} left out" for share in SPARSITIES]
    rows = [["chosen by", "model", "measure", "all neurons", *left_out]]
    for name in RULES:
        cells = [_ratio(found[name, share]["perplexity"], dense) for share in SPARSITIES]
        rows.append([name, "SmolLM2-135M", "perplexity", f"{dense:.1f}", *cells])
    for name, model, what, whole, figures in PUBLISHED:
        cells = ["" if own is None else f"{own:.2f}, x {own / whole:.2f}" for own in figures]
        rows.append([f"{name} (published)", model, what, f"{whole:.2f}", *cells])
    sizes = (
        f"SmolLM2: {result['texts']} articles of WikiText-2's test set, of each the first {result['prompt_tokens']} "
        f"tokens as the prompt and the next {result['continuation']} scored; x: times the figure with all neurons"
    )
    return f"{markdown(rows)}\n\n{sizes}; {made_on(result)}"


def _ratio(figures: _Result, dense: float) -> str:
    return f"{_spread(figures, 1)}, x {figures['mean'] / dense:.2f}"


def own_text() -> str:
    """GLASS's protocol: perplexity and divergence on the full model's own texts."""
    result = newest(OWN_PART)
    rows = [["chosen by", "perplexity", f"KL of the top {result['top']}", "KL of all tokens", "agreement"]]
    rows.append(["all neurons", _spread(result["dense_perplexity"], 2), "0", "0", "100%"])
    for own in result["settings"]:
        kl, top_kl = (_spread(own[name], 2) for name in ("kl", "top_kl"))
        rows.append([own["name"], _spread(own["perplexity"], 2), top_kl, kl, f"{own['agreement']['mean']:.0%}"])
    sizes = (
        f"{result['texts']} texts of {result['continuation']} tokens, behind prompts of {result['prompt_tokens']:.0f} "
        f"on average; {result['keep']:.0%} of the neurons; {result['learnt_texts']} other texts of the model for what "
        f"is global; {result['repetition']:.0%} of the 4-grams of a text came before in it"
    )
    return f"{markdown(rows)}\n\n{sizes}; {made_on(result)}"


def _spread(figures: _Result, digits: int) -> str:
    low, high = figures["ci95"]
    return f"{figures['mean']:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"
