"""What rules of choosing core neurons cost in quality: every rule on the same texts, at equal bytes per token."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import coreinfer_jax as ci
from benchmarks.environment import environment
from coreinfer_jax.lab.evaluation.calibrating import calibrate
from coreinfer_jax.lab.evaluation.comparison import Texts, evaluate, read_prior
from coreinfer_jax.lab.evaluation.settings import PER_TOKEN, RANKINGS, Foreknown, PerToken, Setting
from coreinfer_jax.lab.training.windows import read_text
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.model.weights import Params, weight_bytes_per_step
from coreinfer_jax.sparsity.allocate import Allocation
from coreinfer_jax.sparsity.calibration import PRIOR_RULE
from coreinfer_jax.sparsity.narrow import narrowed_bytes
from coreinfer_jax.sparsity.votes import kept_neurons
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.documents import Documents

# The held-out texts of the embedded models' training, and what `tinystories-656k` was trained to write.
FILES = ("stories.txt", "prose.txt")
TINYSTORIES, STORIES = "tinystories-656k", "tinystories_val.txt"
KEEPS = (0.2, 0.4, 0.6, 0.8)
TEXTS = Texts(prompt_tokens=(16, 64, 256), continuation=64, texts=64)
# Characters of a passage: enough for the longest prompt and its continuation.
PASSAGE = 1800

# What is compared at every keep ratio: (rule, compensation, prior tokens, known, allocation), of models without a
# calibration and with one.
Variant = tuple[str, float, float, Literal["context", "continuation"], Allocation]
UNCALIBRATED: tuple[Variant, ...] = (
    *((rule, 0.0, 0.0, "context", "equal") for rule in RANKINGS),
    *(("votes", share, 0.0, "context", "equal") for share in (0.5, 1.0)),
    *((rule, share, 0.0, "context", "equal") for rule in ("energy", "contribution") for share in (0.5, 1.0)),
    ("votes", 0.0, 0.0, "context", "sensitivity"),
    ("contribution", 0.5, 0.0, "context", "sensitivity"),
    *(("contribution", share, 0.0, "continuation", "equal") for share in (0.0, 0.5)),
    *((rule, 0.0, 0.0, "context", "equal") for rule in PER_TOKEN),
)
CALIBRATED: tuple[Variant, ...] = (
    *((rule, 0.0, 256.0, "context", "equal") for rule in ("votes", "griffin", "energy")),
    *(("contribution", share, 256.0, "context", "equal") for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
    *(("contribution", 0.5, tokens, "context", "equal") for tokens in (64.0, 1024.0)),
    ("votes", 0.0, 256.0, "context", "sensitivity"),
    *(("contribution", 0.5, tokens, "context", "sensitivity") for tokens in (0.0, 256.0)),
    ("contribution", 0.5, 0.0, "continuation", "sensitivity"),
)
# Further sweeps, at one prompt length: of the paper's alpha, and of the layers that are narrowed.
ALPHAS = (0.1, 0.2, 0.4, 0.6, 1.0)
LAYERS = ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.2, 1.0))
PROMPT, SWEPT_KEEP = 64, 0.4


def settings(variants: Sequence[Variant]) -> list[Setting]:
    """Every variant at every keep ratio."""
    return [_setting(keep, *variant) for keep in KEEPS for variant in variants]


def _setting(
    keep: float,
    rule: str,
    compensation: float,
    prior_tokens: float,
    known: Literal["context", "continuation"],
    allocation: Allocation,
) -> Setting:
    if rule in PER_TOKEN:
        return PerToken(rule=rule, beta=keep, allocation=allocation)
    ranking = replace(RANKINGS[rule], prior_tokens=prior_tokens)
    core = ci.CoreConfig(beta=keep, rule=ranking, compensation=compensation, allocation=allocation, linear=False)
    return core if known == "context" else Foreknown(core)


def measure(texts: Path, models: Path) -> Iterator[dict[str, Any]]:
    """One result per model and kind of text: continued by itself, or by another text."""
    for name, params, tokenizer, documents, corpus in subjects(texts, models):
        made_on = environment()
        prior = read_prior(params, tokenizer, corpus)
        known = _calibrated(params, tokenizer, corpus)
        for switched in (False, True):
            how = replace(TEXTS, switched=switched)
            found = [
                result | {"calibrated": calibrated}
                for calibrated, model, variants in ((False, params.weights, UNCALIBRATED), (True, known, CALIBRATED))
                for result in evaluate(model, tokenizer, documents, settings(variants), how, prior=prior)
            ]
            swept = [] if switched else _swept(params.weights, tokenizer, documents)
            yield made_on | {
                "benchmark": "quality",
                "model": name,
                "fingerprint": fingerprint(params),
                "texts": found[0]["texts"],
                "continuation": how.continuation,
                "tokens_of_prior": int(prior[RANKINGS[PRIOR_RULE]][0]["tokens"]),
                "switched": switched,
                "mlp_bytes_per_token": {str(keep): mlp_bytes(params, keep) for keep in KEEPS},
                "bytes_per_token": weight_bytes_per_step(params, 1),
                "settings": [_short(one) for one in found],
                "swept": [_short(one) for one in swept],
            }


def _calibrated(params: Params, tokenizer: Tokenizer, corpus: Documents) -> Params:
    """The model with its own calibration, or one from texts it may know."""
    if params.calibration is not None:
        return params
    how = Texts(prompt_tokens=(PROMPT,), continuation=TEXTS.continuation)
    return replace(params, calibration=calibrate(params, tokenizer, corpus, texts=how).calibration)


def _swept(params: Params, tokenizer: Tokenizer, documents: Documents) -> list[dict[str, Any]]:
    """The paper's votes by alpha, then votes and contribution by the layers that are narrowed."""
    how = replace(TEXTS, prompt_tokens=(PROMPT,))
    paper = replace(ci.CoreConfig.paper(), beta=SWEPT_KEEP)
    best = replace(paper, rule=RANKINGS["contribution"])
    by_alpha = [replace(paper, rule=ci.rules.Votes(alpha=alpha)) for alpha in ALPHAS]
    by_layers = [replace(core, layers=layers) for core in (paper, best) for layers in LAYERS]
    return evaluate(params, tokenizer, documents, [*by_alpha, *by_layers], how)


def mlp_bytes(params: Params, keep: float) -> int:
    """Bytes of MLP matrices that a step reads at a keep ratio."""
    config = params.config
    return narrowed_bytes(params, tuple(range(config.num_layers)), kept_neurons(keep, config.mlp_size), 1)


def subjects(texts: Path, models: Path) -> Iterator[tuple[str, Params, Tokenizer, Documents, Documents]]:
    """Each model, texts to measure it on, and others that it may know beforehand."""
    read = [read_text(texts / file) for file in FILES]
    held_out = [document for text in read for _, document in text.held_out]
    known = [document for text in read for document in text.documents]
    for name in ("opt", "llama"):
        params, tokenizer = ci.load(f"embedded:{name}", "float32")
        assert tokenizer is not None, "the embedded models have tokenizers"
        yield f"embedded:{name}", params, tokenizer, _documents(held_out), _documents(known)
    passages = _passages((texts / STORIES).read_text(encoding="utf-8"))
    params, tokenizer = ci.load(models / TINYSTORIES, "float32")
    assert tokenizer is not None, "the model has a tokenizer"
    yield TINYSTORIES, params, tokenizer, _documents(passages[1::2]), _documents(passages[::2])


def _documents(texts: Sequence[str]) -> Documents:
    return Documents("held-out texts", "", tuple(texts))


def _passages(text: str) -> list[str]:
    """The lines of `text` joined to passages of at least PASSAGE characters."""
    passages, lines = [], []
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= PASSAGE:
            passages.append("".join(lines))
            lines = []
    return passages


def _short(result: dict[str, Any]) -> dict[str, Any]:
    """A setting's figures of four significant digits, without what no table shows."""
    kept = [name for name in result if name == "kl_by_position" or not name.endswith("by_position")]
    return {name: _rounded(result[name]) for name in kept if name != "too_short"}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_rounded(own) for own in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
