"""`coreinfer train`."""

import argparse
import sys
from dataclasses import fields

from coreinfer_jax.lab.training import Recipe, train
from coreinfer_jax.lab.training.trainable import TRAINABLE

HELP = "train a small model on text files, or continue a run that was interrupted"
_MEANING = {
    "vocab_size": "entries of the tokenizer",
    "hidden_size": "D",
    "mlp_size": "F, MLP neurons per layer",
    "num_layers": "L",
    "num_heads": "N",
    "sequence": "tokens per window, and positions of the model",
    "batch": "windows per step",
    "steps": "of the optimizer",
    "warmup": "steps of linear warm-up",
    "learning_rate": "at its peak",
    "weight_decay": "of matrices",
    "clip": "largest norm of the gradient",
    "seed": "of first weights and order of windows",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes: one option per field of `Recipe`."""
    parser.add_argument("directory", metavar="DIR", help="of the run; continued if it exists")
    parser.add_argument("texts", metavar="TEXT", nargs="+", help="UTF-8 files, documents ended by lines <|endoftext|>")
    parser.add_argument("--family", choices=tuple(TRAINABLE), default=next(iter(TRAINABLE)), help="default %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default %(default)s")
    parser.add_argument("--init-from", metavar="MODEL", help="train this model further: what --model takes elsewhere")
    default = Recipe(family=next(iter(TRAINABLE)))
    for name, meaning in _MEANING.items():
        value = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=value,
            metavar="N" if isinstance(value, int) else "X",
            help=f"{meaning} (%(default)s)",
        )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    try:
        print(train(options.directory, options.texts, recipe, options.init_from))
    except KeyboardInterrupt:
        print("[stopped; the same command goes on]", file=sys.stderr)
        raise
