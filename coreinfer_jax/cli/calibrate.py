"""`coreinfer calibrate`."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from coreinfer_jax.cli import arguments
from coreinfer_jax.cli.eval_texts import table
from coreinfer_jax.cli.info import setting_in_words
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.files import alone, check_directory, to_path
from coreinfer_jax.io.calibration_file import CALIBRATION, write_calibration
from coreinfer_jax.io.embedded import PREFIX
from coreinfer_jax.io.loading import model_path, open_model, stored_fingerprint
from coreinfer_jax.lab.evaluation.calibrating import BOUND, TEXTS, Bound, Calibrated, calibrate
from coreinfer_jax.lab.evaluation.comparison import Texts
from coreinfer_jax.lab.evaluation.speed import milliseconds_per_token
from coreinfer_jax.model.spread import spread_calibration
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choosers import Core, settings_of
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.documents import Documents, read_documents

HELP = "find how many neurons a model can spare, and set it to that"
# What is timed: enough steps that starting them does not count, and a prompt of ordinary length.
TIMED_TOKENS, ROUNDS = 33, 3
TIMED_PROMPT = "Once upon a time there was a village by a river, and in it lived a baker who rose before the sun."


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    arguments.add_model(parser)
    arguments.add_mesh(parser)
    arguments.add_documents(parser, required=False, default="prompts of the package, answered by the model itself")
    parser.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help=f"per token, from the full model; its upper 95 %% end ({BOUND.max_kl}, if nothing else bounds)",
    )
    parser.add_argument(
        "--min-agreement",
        type=float,
        metavar="SHARE",
        help="of tokens with the full model's choice; its lower 95 %% end",
    )
    arguments.add_texts(parser, TEXTS)
    parser.add_argument("--answers", action="store_true", help="with --data: read the model's own answers as well")
    parser.add_argument(
        "--distil",
        type=int,
        default=0,
        metavar="STEPS",
        help="train linear neurons for so long on what the full model foretells (0); some hundreds pay, and take long",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    bounded = options.max_kl is not None or options.min_agreement is not None
    bound, texts = Bound(options.max_kl, options.min_agreement) if bounded else BOUND, arguments.texts(options)
    directory = _writable(options.model)
    documents = None if options.data is None else read_documents(to_path(options.data), options.text_column)
    if documents is None and texts.prompt_tokens != TEXTS.prompt_tokens:
        raise CoreInferError("--prompt-tokens: is of texts in a file; add --data FILE, or leave it out")
    if options.answers and documents is None:
        raise CoreInferError(
            "--answers: goes with --data FILE; without one the model's own answers are read in any case"
        )
    if options.distil < 0:
        raise CoreInferError(f"--distil {options.distil}: give a number of steps, or 0 for none")
    with alone(directory, "calibration"):
        _calibrate(options, directory, documents, bound, texts)


def _calibrate(
    options: argparse.Namespace, directory: Path, documents: Documents | None, bound: Bound, texts: Texts
) -> None:
    config, tensors = open_model(directory)
    stored = stored_fingerprint(config, tensors)
    params, tokenizer = arguments.load_model(options, calibrated=False)
    found = calibrate(params, tokenizer, documents, bound, texts, answers=options.answers, steps=options.distil)
    if stored_fingerprint(*open_model(directory)) != stored:
        raise CoreInferError(f"{directory}: its weights were replaced meanwhile; calibrate again")
    write_calibration(directory, config, stored, found.calibration, found.facts)  # a failure of timing loses nothing
    facts = found.facts | {"speed": _speed(params, tokenizer, found)}
    write_calibration(directory, config, stored, found.calibration, facts)
    core = None if found.calibration.core is None else settings_of(found.calibration.core)
    if options.json:
        print(json.dumps({"model": options.model, "core": core, "facts": facts, "settings": found.results}))
        return
    print(f"{table(found.results)}\n")
    print(setting_in_words(core, facts, params.config.mlp_size))
    print(_verdict(found, facts["speed"]))
    print(f"Written to {directory / CALIBRATION}")


def _writable(model: str) -> Path:
    """The directory of a model, where a calibration can be written into it."""
    if model.startswith(PREFIX):
        raise CoreInferError(
            f"{model}: is calibrated, and part of the package; convert it to a directory to calibrate that"
        )
    directory = model_path(model)
    check_directory(directory)
    if not os.access(directory, os.W_OK):
        raise CoreInferError(f"{directory}: cannot be written into; make it writable, the calibration goes there")
    return directory


def _speed(params: Params, tokenizer: Tokenizer, found: Calibrated) -> dict[str, Any]:
    """Milliseconds per new token with all neurons and with those that a calibration keeps; nothing where these are all.

    What was timed is cut to the room that the model has.
    """
    if found.calibration.core is None:
        return {}
    prompt = tokenizer.encode(TIMED_PROMPT)[: params.config.max_positions // 2]
    new_tokens = min(TIMED_TOKENS, params.config.max_positions - len(prompt))
    ways: dict[str, Core] = {"all": None, "core": found.calibration.core}
    known = found.calibration if params.mesh is None else spread_calibration(found.calibration, params.mesh)
    taken = milliseconds_per_token(replace(params, calibration=known), prompt, ways, new_tokens, ROUNDS)
    medians = {way: float(np.median(times)) for way, times in taken.items()}
    kind = jax.devices()[0].device_kind
    device = kind if params.mesh is None else f"{params.shards} x {kind}"
    return medians | {"device": device, "dtype": params.dtype.name}


def _verdict(found: Calibrated, speed: Mapping[str, Any]) -> str:
    """What that costs and what it buys, in plain sentences."""
    if not found.chosen:
        most = max(result["keep"] for result in found.results)
        nearest = [result for result in found.results if result["keep"] == most]
        return (
            "No keep ratio stays within the bound, so the model goes on with all its neurons. "
            f"At {most:g} it would lose {_loss(nearest)}."
        )
    gain = speed["all"] / speed["core"]
    bought = f"{gain:.2f} times as fast" if gain > 1 else "which gains nothing"
    return (
        f"It costs {_loss(found.chosen)}. A token takes {speed['core']:.3g} ms instead of {speed['all']:.3g}, {bought}."
    )


def _loss(results: Sequence[Mapping[str, Any]]) -> str:
    """The largest loss over all lengths of prompt."""
    kl = max(result["kl"]["mean"] for result in results)
    agreement = min(result["agreement"]["mean"] for result in results)
    return f"{kl:.3f} nats per token against the full model, whose choice it shares for {agreement:.0%} of the tokens"
