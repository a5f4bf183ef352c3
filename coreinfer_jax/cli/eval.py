"""`coreinfer eval`."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from coreinfer_jax.checkpoint.files import to_path
from coreinfer_jax.cli import eval_tasks
from coreinfer_jax.cli import options as shared
from coreinfer_jax.config import CoreConfig
from coreinfer_jax.core.rules import RULES, Sums
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.evaluation.calibrate import RULE as PRIOR_RULE
from coreinfer_jax.evaluation.free_running import core_of, free_running
from coreinfer_jax.evaluation.measure import PER_TOKEN, Setting
from coreinfer_jax.evaluation.run import Texts, check_settings, compare, read_prior
from coreinfer_jax.inputs import check_length
from coreinfer_jax.params import Calibration, Params
from coreinfer_jax.text.corpus import Corpus
from coreinfer_jax.text.documents import read_documents

HELP = "measure what core neurons cost in quality, on texts of your own or on tasks"


# Options that say something of texts only.
OF_TEXTS = (
    "text_column",
    "prior",
    "prompt_tokens",
    "continuation",
    "texts",
    "switched",
    "generate",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    shared.add_model(parser)
    shared.add_documents(parser, required=False)
    eval_tasks.add_options(parser)
    parser.add_argument(
        "--preset",
        choices=shared.PRESETS,
        default="default",
        help="what is not named: by the paper, or as recommended for the model",
    )
    parser.add_argument(
        "--rule", nargs="+", choices=(*RULES, *PER_TOKEN), metavar="RULE", help=", ".join((*RULES, *PER_TOKEN))
    )
    parser.add_argument("--beta", nargs="+", type=float, help="share of neurons kept, (0, 1]; several to compare")
    parser.add_argument("--alpha", type=float, help="token-wise share, (0, 1]")
    parser.add_argument("--layers", type=float, nargs=2, metavar=("FROM", "TO"), help="which layers are narrowed")
    parser.add_argument(
        "--compensation",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="of their mean at which dropped neurons stand, [0, 1]",
    )
    parser.add_argument(
        "--prior",
        metavar="FILE",
        help="texts whose activations count beside the prompt's, in place of the calibration's",
    )
    parser.add_argument("--prior-tokens", type=float, metavar="N", help="as how many tokens of the prompt (64)")
    shared.add_texts(parser)
    parser.add_argument("--switched", action="store_true", help="go on with the continuation of another text")
    parser.add_argument(
        "--generate", type=int, default=0, metavar="N", help="also let both models write N tokens after each context"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    one_sided = (*OF_TEXTS, *eval_tasks.OF_TASKS)
    parser.set_defaults(run=_run, usual={name: parser.get_default(name) for name in one_sided})


def _run(options: argparse.Namespace) -> None:
    if (options.data is None) == (options.tasks is None):
        raise CoreInferError("eval: give --data FILE, with texts of your own, or --tasks NAME ..., and not both")
    if options.tasks is not None:
        _refuse(options, OF_TEXTS, "--data")
        eval_tasks.run(options)
        return
    _refuse(options, eval_tasks.OF_TASKS, "--tasks")
    texts = replace(shared.texts(options), switched=options.switched)
    documents = read_documents(to_path(options.data), options.text_column)
    corpus = None if options.prior is None else read_documents(to_path(options.prior), options.text_column)
    params, tokenizer = shared.load_model(options)
    preset = shared.preset(options, params)
    alpha = preset.alpha if options.alpha is None else options.alpha
    settings = _settings(options, preset, params.calibration is not None)
    check_settings(params.config, settings, texts, alpha)
    cores = [core_of(setting, alpha) for setting in settings] if options.generate else []
    if options.generate:
        check_length(max(texts.prompt_tokens), options.generate, params.config)
    prior = None
    if corpus is not None:
        prior = read_prior(params, tokenizer, corpus, alpha=alpha, seed=options.seed)
    elif params.calibration is not None:
        prior = params.calibration.by_rule
    selection = Corpus(documents, tokenizer, texts.seed).select(texts.tokens, texts.texts)
    results = compare(params, selection, settings, texts, alpha=alpha, prior=prior)
    written = _written(_with_prior(params, prior), selection.rows, cores, texts, options.generate)
    if options.json:
        found = {"model": options.model, "data": documents.name, "alpha": alpha, "settings": results}
        print(json.dumps(found | ({"generated": written} if written else {})))
        return
    print(table(results))
    if written:
        print(f"\n{_table_of_written(written)}")


def _refuse(options: argparse.Namespace, names: Sequence[str], other: str) -> None:
    """Refuse options that would change nothing."""
    for name in names:
        if getattr(options, name) != options.usual[name]:
            raise CoreInferError(f"--{name.replace('_', '-')}: only says something of {other}; leave it out")


def _settings(options: argparse.Namespace, preset: CoreConfig, calibrated: bool) -> list[Setting]:
    """Every rule at every keep ratio; of what is not named, the preset's own rule takes the preset's."""
    if options.prior is None and not calibrated and options.prior_tokens is not None:
        raise CoreInferError(f"--prior-tokens {options.prior_tokens:g}: is of --prior FILE; give that too")
    asked = preset.prior_tokens if options.prior_tokens is None else options.prior_tokens
    layers = preset.layers if options.layers is None else tuple(options.layers)

    def prior_tokens(rule: str) -> float:
        known = options.prior is not None or (calibrated and rule == PRIOR_RULE)
        return asked if known and rule not in PER_TOKEN else 0.0

    return [
        Setting(rule, keep, compensation, prior_tokens(rule), layers=layers)
        for rule in options.rule or [preset.ranking]
        for compensation in options.compensation or [preset.compensation if rule == preset.ranking else 0.0]
        for keep in options.beta or [preset.beta]
    ]


def _with_prior(params: Params, prior: list[dict[str, Sums]] | None) -> Params:
    """`params` that generate with what is known of other texts."""
    if prior is None:
        return params
    return replace(params, calibration=Calibration(tuple(layer[PRIOR_RULE] for layer in prior), None))


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
    head = ["prompt", "rule", "kept", "like the full model's, tokens", "repeated 4-grams", "length"]
    rows = [head]
    for one in written:
        core = one["core"]
        rule = ["all neurons", ""] if core is None else [core["rule"], f"{core['beta']:g}"]
        figures = (_shown(one[name], digits) for name, digits in (("departure", 1), ("repetition", 3), ("length", 1)))
        rows.append([str(one["prompt_tokens"]), *rule, *figures])
    return shared.table(rows)


def table(results: list[dict[str, Any]]) -> str:
    """The results for a terminal."""
    head = ["prompt", "rule", "of mean", "prior", "kept", "KL, nats", "agreement", "perplexity", "all neurons"]
    rows = [head] + [
        [
            str(r["prompt_tokens"]),
            r["rule"],
            f"{r['compensation']:g}",
            f"{r['prior_tokens']:g}",
            f"{r['keep']:g}",
            *(_shown(r[name], digits) for name, digits in (("kl", 3), ("agreement", 3), ("perplexity", 2))),
            f"{r['dense_perplexity']['mean']:.2f}",
        ]
        for r in results
    ]
    return shared.table(rows)


def _shown(value: dict[str, Any], digits: int) -> str:
    low, high = value["ci95"]
    return f"{value['mean']:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"
