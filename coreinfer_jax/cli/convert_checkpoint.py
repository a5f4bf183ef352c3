"""`coreinfer convert`."""

import argparse

from coreinfer_jax.cli import arguments
from coreinfer_jax.io import convert
from coreinfer_jax.io.mapping import DTYPES

HELP = "convert a Hugging Face checkpoint"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help=arguments.MODELS,
    )
    parser.add_argument("destination", metavar="DST", help="new directory")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}; default: the checkpoint's")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    print(convert(options.source, options.destination, options.dtype))
