"""`coreinfer eval --tasks`: what core neurons cost on tasks of lm-evaluation-harness."""

import argparse
import json
from typing import Any

from coreinfer_jax.cli import arguments, compared, processes
from coreinfer_jax.lab.evaluation.free_running import generating
from coreinfer_jax.sparsity.calibration import PRIOR_RULE
from coreinfer_jax.sparsity.stability import CoreConfig

# Options that say something of tasks only.
OF_TASKS = ("task_data", "limit", "num_fewshot", "batch_size", "chat")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which tasks, and how much of them."""
    parser.add_argument(
        "--tasks", nargs="+", metavar="NAME", help="of lm-evaluation-harness ('.[lm-eval]'), in place of --data"
    )
    parser.add_argument(
        "--task-data", nargs="+", default=[], metavar="DIR", help="directories with the files of tasks named local_*"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="documents per task, at most (default: all)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each (default: as a task says)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="B", help="rows at a time (%(default)s)")
    parser.add_argument("--chat", action="store_true", help="put contexts into the model's chat template")


def run(options: argparse.Namespace) -> None:
    """Run the tasks on the full model and at every keep ratio."""
    _cores(options, arguments.preset(options))  # refuses what can be refused before anything is loaded
    # Not before it is asked for: the import takes a second, and needs an extra.
    from coreinfer_jax.lab.evaluation.tasks.suite import Tasks, evaluate_tasks

    tasks = Tasks(options.tasks, options.task_data, limit=options.limit, num_fewshot=options.num_fewshot)
    params, tokenizer = arguments.load_model(options)
    preset = arguments.preset(options, params)
    cores = _cores(options, preset)
    remedy = f"take --rule {PRIOR_RULE} of a calibrated model"
    compared.refuse_unused(options, preset, lambda rule: params.calibration is not None and _has_prior(rule), remedy)
    results = evaluate_tasks(
        params,
        tokenizer,
        tasks,
        [None, *cores],
        model=options.model,
        batch_size=options.batch_size,
        chat=options.chat,
        seed=options.seed,
    )
    print(json.dumps(results) if options.json else arguments.table(_rows(results)))
    truncated = results["settings"][0]["truncated"]
    if truncated:
        processes.say(
            f"[{truncated} requests exceed the model's {params.config.max_positions} positions: "
            "their contexts lost their first tokens]"
        )


def _has_prior(rule: str) -> bool:
    return rule == PRIOR_RULE


def _cores(options: argparse.Namespace, preset: CoreConfig) -> list[CoreConfig]:
    return generating([one for own in compared.settings(options, preset, _has_prior) for one in own])


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """A line per task and metric, a column per choice of core neurons."""
    settings = results["settings"]
    rows = [["task", "shots", "documents", "metric", *arguments.labels([one["core"] for one in settings])]]
    for name, about in results["tasks"].items():
        facts = [name, str(about["num_fewshot"]), str(about["documents"])]
        rows += [
            [*facts, metric, *(_shown(one["scores"][name][metric]) for one in settings)]
            for metric in settings[0]["scores"][name]
        ]
    return rows


def _shown(score: dict[str, float | None]) -> str:
    return f"{score['value']:.4f}" + ("" if score["stderr"] is None else f" +- {score['stderr']:.4f}")
