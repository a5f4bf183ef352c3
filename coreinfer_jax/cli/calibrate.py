"""`coreinfer calibrate`."""

import argparse
import json
import os

from coreinfer_jax.cli import arguments
from coreinfer_jax.cli.eval_texts import table
from coreinfer_jax.cli.info import setting_in_words
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.files import is_directory, to_path
from coreinfer_jax.io.calibration_file import CALIBRATION, write_calibration
from coreinfer_jax.io.embedded import PREFIX
from coreinfer_jax.io.loading import model_path, open_model, stored_fingerprint
from coreinfer_jax.lab.evaluation.calibrating import Bound, calibrate
from coreinfer_jax.sparsity.choosers import settings_of
from coreinfer_jax.text.documents import read_documents

HELP = "find the cheapest setting for a model that meets a bound on your texts"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    arguments.add_model(parser)
    arguments.add_documents(parser)
    parser.add_argument(
        "--max-kl", type=float, metavar="NATS", help="per token, from the full model; its upper 95 %% end"
    )
    parser.add_argument(
        "--min-agreement",
        type=float,
        metavar="SHARE",
        help="of tokens with the full model's choice; its lower 95 %% end",
    )
    arguments.add_texts(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    bound, texts = Bound(options.max_kl, options.min_agreement), arguments.texts(options)
    if options.model.startswith(PREFIX):
        raise CoreInferError(
            f"{options.model}: is calibrated, and part of the package; convert it to a directory to calibrate that"
        )
    directory = model_path(options.model)
    if is_directory(directory) and not os.access(directory, os.W_OK):
        raise CoreInferError(f"{directory}: cannot be written into; make it writable, the calibration goes there")
    documents = read_documents(to_path(options.data), options.text_column)
    params, tokenizer = arguments.load_model(options, calibrated=False)
    found = calibrate(params, tokenizer, documents, bound, texts)
    write_calibration(directory, stored_fingerprint(*open_model(directory)), found.calibration, found.facts)
    core = None if found.calibration.core is None else settings_of(found.calibration.core)
    if options.json:
        print(json.dumps({"model": options.model, "core": core, "facts": found.facts, "settings": found.results}))
        return
    if found.results:
        print(table(found.results))
    chosen = setting_in_words(core, found.facts, params.config.mlp_size)
    print(f"{'no keep ratio meets the bound: ' if core is None else ''}{chosen}; written to {directory / CALIBRATION}")
