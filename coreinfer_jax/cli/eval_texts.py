"""`coreinfer eval --data`: what core neurons cost on texts of one's own."""

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from coreinfer_jax.cli import options as shared
from coreinfer_jax.engine.prompts import check_length
from coreinfer_jax.files import to_path
from coreinfer_jax.lab.evaluation.chart import draw, require_matplotlib, title
from coreinfer_jax.lab.evaluation.comparison import Texts, check_settings, compare, read_prior
from coreinfer_jax.lab.evaluation.free_running import core_of, free_running
from coreinfer_jax.lab.evaluation.measure import PER_TOKEN, Setting
from coreinfer_jax.model.config import PRIOR_RULE, CoreConfig
from coreinfer_jax.model.weights import Calibration, Params
from coreinfer_jax.sparsity.rules import Sums
from coreinfer_jax.text.corpus import Corpus
from coreinfer_jax.text.documents import read_documents


def run(options: argparse.Namespace) -> None:
    """Compare the settings asked for with the full model."""
    if options.chart is not None:
        require_matplotlib()
    texts = replace(shared.texts(options), switched=options.switched)
    documents = read_documents(to_path(options.data), options.text_column)
    corpus = None if options.prior is None else read_documents(to_path(options.prior), options.text_column)
    params, tokenizer = shared.load_model(options)
    preset = shared.preset(options, params)
    alphas = options.alpha or [preset.alpha]
    settings = _settings(options, preset, params.calibration is not None)
    for alpha in alphas:
        check_settings(params, settings, texts, alpha)
    rules = [setting.rule for setting in settings]
    fixed = [rule for rule in rules if rule not in PER_TOKEN]
    known = bool(fixed) if corpus else params.calibration is not None and PRIOR_RULE in rules
    shared.refuse_unused_by_rules(options, rules, known, "give --prior FILE, or leave it out")
    cores = [core_of(setting, alpha) for alpha in alphas for setting in settings] if options.generate else []
    if options.generate:
        check_length(max(texts.prompt_tokens), options.generate, params.config)
    selection = Corpus(documents, tokenizer, texts.seed).select(texts.tokens, texts.texts)
    results: list[dict[str, Any]] = []
    for alpha in alphas:
        prior = None if params.calibration is None else params.calibration.by_rule
        if corpus is not None:
            prior = read_prior(params, tokenizer, corpus, alpha=alpha, seed=options.seed)
        results += compare(params, selection, settings, texts, alpha=alpha, prior=prior)
    written = _written(_with_prior(params, prior), selection.rows, cores, texts, options.generate)
    if options.chart is not None:
        draw(results, to_path(options.chart))
    if options.json:
        found = {"model": options.model, "data": documents.name, "settings": results}
        print(json.dumps(found | ({"generated": written} if written else {})))
        return
    print(table(results))
    if written:
        print(f"\n{_table_of_written(written)}")


def _settings(options: argparse.Namespace, preset: CoreConfig, calibrated: bool) -> list[Setting]:
    """Every rule at every keep ratio; of what is not named, the preset's own rule takes the preset's."""
    asked = preset.prior_tokens if options.prior_tokens is None else options.prior_tokens
    ranges = [preset.layers] if options.layers is None else [(first, last) for first, last in options.layers]

    def prior_tokens(rule: str) -> float:
        known = options.prior is not None or (calibrated and rule == PRIOR_RULE)
        return asked if known and rule not in PER_TOKEN else 0.0

    return [
        Setting(rule, keep, compensation, prior_tokens(rule), layers=layers, allocation=allocation)
        for layers in ranges
        for rule in options.rule or [preset.ranking]
        for compensation in options.compensation or [preset.compensation if rule == preset.ranking else 0.0]
        for allocation in options.allocation or [preset.allocation if rule == preset.ranking else "equal"]
        for keep in options.beta or [preset.beta]
    ]


def _with_prior(params: Params, prior: list[dict[str, Sums]] | None) -> Params:
    """`params` that generate with what is known of other texts."""
    if prior is None:
        return params
    gains = None if params.calibration is None else params.calibration.gains
    return replace(params, calibration=Calibration(tuple(layer[PRIOR_RULE] for layer in prior), gains, None))


def _written(
    params: Params, rows: np.ndarray, cores: list[CoreConfig], texts: Texts, new_tokens: int
) -> list[dict[str, Any]]:
    """What both models write after the contexts of each length; nothing where no tokens are asked for."""
    if not new_tokens:
        return []
    longest = max(texts.prompt_tokens)
    return [
        {"prompt_tokens": length, "core": None if core is None else asdict(core)} | figures
        for length in texts.prompt_tokens
        for core, figures in zip(
            [None, *cores],
            free_running(params, rows[:, longest - length : longest], cores, new_tokens, texts.seed),
            strict=True,
        )
    ]


def _table_of_written(written: list[dict[str, Any]]) -> str:
    rows = [["prompt", "setting", "like the full model's, tokens", "repeated 4-grams", "length"]]
    for label, one in zip(shared.labels([one["core"] for one in written]), written, strict=True):
        figures = (_shown(one[name], digits) for name, digits in (("departure", 1), ("repetition", 3), ("length", 1)))
        rows.append([str(one["prompt_tokens"]), label, *figures])
    return shared.table(rows)


def table(results: list[dict[str, Any]]) -> str:
    """The results for a terminal."""
    head = ["prompt", "setting", "kept", "MB per token", "KL, nats", "agreement", "perplexity", "all neurons"]
    rows = [head] + [
        [
            str(r["prompt_tokens"]),
            title(r),
            f"{r['keep']:g}",
            f"{r['bytes_per_token'] / 1e6:.1f}",
            *(_shown(r[name], digits) for name, digits in (("kl", 3), ("agreement", 3), ("perplexity", 2))),
            f"{r['dense_perplexity']['mean']:.2f}",
        ]
        for r in results
    ]
    return shared.table(rows)


def _shown(value: dict[str, Any], digits: int) -> str:
    low, high = value["ci95"]
    return f"{value['mean']:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"
