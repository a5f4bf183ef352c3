"""`coreinfer eval`."""

import argparse
from collections.abc import Sequence

from coreinfer_jax.cli import arguments, eval_tasks, eval_texts
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.evaluation.settings import PER_TOKEN, RANKINGS
from coreinfer_jax.sparsity.allocate import ALLOCATIONS
from coreinfer_jax.sparsity.stability import CoreConfig

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
    "chart",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    arguments.add_model(parser)
    arguments.add_processes(parser)
    arguments.add_documents(parser, required=False)
    eval_tasks.add_options(parser)
    parser.add_argument(
        "--preset",
        choices=arguments.PRESETS,
        default="default",
        help="what is not named: by the paper, or as calibrated and else by CoreConfig()",
    )
    rules = (*RANKINGS, *PER_TOKEN)
    parser.add_argument("--rule", nargs="+", choices=rules, metavar="RULE", help=", ".join(rules))
    parser.add_argument("--beta", nargs="+", type=float, help="share of neurons kept, (0, 1]; several to compare")
    parser.add_argument("--alpha", nargs="+", type=float, help="votes: token-wise share, (0, 1]; several to compare")
    parser.add_argument(
        "--layers",
        type=float,
        nargs=2,
        action="append",
        metavar=("FROM", "TO"),
        help="which layers are narrowed, as fractions of depth; may be repeated",
    )
    parser.add_argument(
        "--compensation",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="of their mean at which dropped neurons stand, [0, 1]",
    )
    parser.add_argument(
        "--linear",
        nargs="+",
        choices=("yes", "no"),
        help="whether the calibration's linear neurons stand for dropped ones (yes); both to compare",
    )
    parser.add_argument(
        "--allocation",
        nargs="+",
        choices=ALLOCATIONS,
        help="how the kept share is divided among layers: by what the calibration found each to need, without one more "
        "for the first, or equal",
    )
    parser.add_argument(
        "--prior",
        metavar="FILE",
        help="texts whose activations count beside the prompt's, in place of the calibration's",
    )
    parser.add_argument(
        "--prior-tokens",
        type=float,
        metavar="N",
        help=f"as how many tokens of the prompt ({CoreConfig().ranking.prior_tokens:g})",
    )
    arguments.add_texts(parser)
    parser.add_argument("--switched", action="store_true", help="go on with the continuation of another text")
    parser.add_argument(
        "--generate", type=int, default=0, metavar="N", help="also let both models write N tokens after each context"
    )
    parser.add_argument("--chart", metavar="FILE", help="draw KL divergence against bytes read per token")
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
    eval_texts.run(options)


def _refuse(options: argparse.Namespace, names: Sequence[str], other: str) -> None:
    """Refuse options that would change nothing."""
    for name in names:
        if getattr(options, name) != options.usual[name]:
            raise CoreInferError(f"--{name.replace('_', '-')}: only says something of {other}; leave it out")
