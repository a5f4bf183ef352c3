"""`coreinfer plan`."""

import argparse

import numpy as np

from coreinfer_jax.checks import check_whole
from coreinfer_jax.cli import arguments
from coreinfer_jax.engine.budget import check_plan, plan_request
from coreinfer_jax.engine.generation import make_request
from coreinfer_jax.engine.options import GenerateOptions
from coreinfer_jax.io.loading import unloaded

HELP = "say what a model takes of a device that it does not fit, and what is moved there"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", metavar="MODEL", help=f"converted directory, {arguments.MODELS}, embedded:llama")
    arguments.add_place(parser)
    arguments.add_device_memory(parser, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="of each prompt (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of each row (%(default)s)")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="prompts at a time (%(default)s)")
    arguments.add_core(parser)
    arguments.add_lossless(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    for name in ("prompt_tokens", "rows"):
        check_whole(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    arguments.core_config(options)
    budget = arguments.device_memory(options)
    assert budget is not None, "the option is required"
    arguments.choose_device(options.device)
    params, _ = unloaded(options.model, options.dtype)
    core, groups = arguments.core_and_groups(options, params)
    prompts = np.zeros((options.rows, options.prompt_tokens), np.int32)
    asked: GenerateOptions = {
        "groups": groups,
        "max_new_tokens": options.max_new_tokens,
        "lossless": options.lossless,
    }
    request = make_request(params, prompts, core, asked)
    plan = plan_request(request, budget)
    print(plan.told())
    check_plan(request, plan)
