"""`coreinfer eval --data`: what core neurons cost on texts of one's own."""

import argparse
import json
from dataclasses import replace
from typing import Any

import numpy as np

from coreinfer_jax.cli import arguments, compared, processes
from coreinfer_jax.engine.prompts import check_length
from coreinfer_jax.files import to_path
from coreinfer_jax.lab.evaluation.chart import check_chart, draw, title
from coreinfer_jax.lab.evaluation.comparison import Texts, check_settings, compare, read_prior
from coreinfer_jax.lab.evaluation.free_running import free_running, generating
from coreinfer_jax.lab.evaluation.settings import RANKINGS, Prior, prior_of
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.calibration import PRIOR_RULE, Calibration, gains_of
from coreinfer_jax.sparsity.choosers import settings_of
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.text.corpus import Corpus
from coreinfer_jax.text.documents import read_documents


def run(options: argparse.Namespace) -> None:
    """Compare the settings asked for with the full model."""
    chart = None if options.chart is None else to_path(options.chart)
    if chart is not None:
        check_chart(chart)
    texts = replace(arguments.texts(options), switched=options.switched)
    documents = read_documents(to_path(options.data), options.text_column)
    corpus = None if options.prior is None else read_documents(to_path(options.prior), options.text_column)
    params, tokenizer = arguments.load_model(options)
    preset = arguments.preset(options, params)

    def has_prior(rule: str) -> bool:
        return corpus is not None or (params.calibration is not None and rule == PRIOR_RULE)

    by_alpha = list(compared.settings(options, preset, has_prior))
    every = [setting for settings in by_alpha for setting in settings]
    check_settings(params, every, texts)
    compared.refuse_unused(options, preset, has_prior, "give --prior FILE, or leave it out")
    cores = generating(every, params) if options.generate else []
    if options.generate:
        check_length(max(texts.prompt_tokens), options.generate, params.config)
    selection = Corpus(documents, tokenizer, texts.seed).select(texts.tokens, texts.texts)
    prior = prior_of(params.calibration)
    if corpus is not None:
        rules = [setting.ranking for setting in every if isinstance(setting, CoreConfig)]
        prior = read_prior(params, tokenizer, corpus, rules, seed=options.seed)
        params = _with_prior(params, prior)
    results = [result for settings in by_alpha for result in compare(params, selection, settings, texts, prior)]
    written = _written(params, selection.rows, cores, texts, options.generate)
    _print(options, documents.name, results, written)
    if chart is not None and processes.is_first():  # last: whatever prevents it, what was measured is told
        draw(results, chart)


def _print(
    options: argparse.Namespace, data: str, results: list[dict[str, Any]], written: list[dict[str, Any]]
) -> None:
    if options.json:
        found = {"model": options.model, "data": data, "settings": results}
        print(json.dumps(found | ({"generated": written} if written else {})))
        return
    print(table(results))
    if written:
        print(f"\n{_table_of_written(written)}")


def _with_prior(params: Params, prior: Prior) -> Params:
    """`params` with what is known of other texts, in place of what a calibration read."""
    sums = prior.get(RANKINGS[PRIOR_RULE])
    return params if sums is None else replace(params, calibration=Calibration(sums, gains_of(params), None))


def _written(
    params: Params, rows: np.ndarray, cores: list[CoreConfig], texts: Texts, new_tokens: int
) -> list[dict[str, Any]]:
    """What both models write after the contexts of each length; nothing where no tokens are asked for."""
    if not new_tokens:
        return []
    longest = max(texts.prompt_tokens)
    return [
        {"prompt_tokens": length, "core": None if core is None else settings_of(core)} | figures
        for length in texts.prompt_tokens
        for core, figures in zip(
            [None, *cores],
            free_running(params, rows[:, longest - length : longest], cores, new_tokens, texts.seed),
            strict=True,
        )
    ]


def _table_of_written(written: list[dict[str, Any]]) -> str:
    rows = [["prompt", "setting", "like the full model's, tokens", "repeated 4-grams", "length"]]
    for label, one in zip(arguments.labels([one["core"] for one in written]), written, strict=True):
        figures = (_shown(one[name], digits) for name, digits in (("departure", 1), ("repetition", 3), ("length", 1)))
        rows.append([str(one["prompt_tokens"]), label, *figures])
    return arguments.table(rows)


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
    return arguments.table(rows)


def _shown(value: dict[str, Any], digits: int) -> str:
    low, high = value["ci95"]
    return f"{value['mean']:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"
