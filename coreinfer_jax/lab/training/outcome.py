"""What a finished training run leaves: the model, its tokenizer, the loss curve, and the facts of how it was made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_jax.device import hardware
from coreinfer_jax.files import SETTINGS, copy_existing, new_directory, read_back, read_json
from coreinfer_jax.io.export import write_hugging_face
from coreinfer_jax.io.loading import open_model
from coreinfer_jax.io.mapping import parse_dtype
from coreinfer_jax.lab.training.checkpoints import History
from coreinfer_jax.lab.training.curve import LOSS_JSON, LOSS_PNG
from coreinfer_jax.lab.training.preparation import EARLIER, FACTS, TOKENS
from coreinfer_jax.lab.training.recipe import Recipe
from coreinfer_jax.lab.training.windows import Text, load_tokens
from coreinfer_jax.model.weights import Params, named_leaves
from coreinfer_jax.text import TOKENIZER_FILES, load_tokenizer

# What the command line and transformers draw with unless told otherwise: models this small, left to their most probable
# token, soon go round in circles.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9}


def write_model(
    path: Path, run: Path, params: Params, history: History, recipe: Recipe, sources: Sequence[Text]
) -> None:
    """Write `params` and all that goes with them into the new directory `path`, from the files in `run`."""
    facts = _facts(run, params, history, recipe, sources)
    with new_directory(path) as partial:
        write_hugging_face(partial, params, parse_dtype("bfloat16"))
        generation = partial / "generation_config.json"
        generation.write_text(json.dumps(read_json(generation) | SAMPLING, indent=2) + "\n", encoding="utf-8")
        copy_existing(run, partial, (*TOKENIZER_FILES, LOSS_JSON, LOSS_PNG))
        (partial / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with read_back(path):
            open_model(partial)
            load_tokenizer(partial)


def _facts(run: Path, params: Params, history: History, recipe: Recipe, sources: Sequence[Text]) -> dict[str, Any]:
    return {
        "recipe": asdict(recipe),
        "parameters": sum(leaf.size for _, leaf in named_leaves(params)),
        "tokens_seen": recipe.steps * recipe.batch * recipe.sequence,
        "held_out": _measured(run, history.records[-1]["held_out"], recipe, sources),
        "seconds": round(history.seconds),
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("coreinfer_jax", "jax", "optax")},
        "texts": [
            {
                "file": source.name,
                "sha256": source.digest,
                "documents": len(source.documents),
                "held_out": [{"document": number, "begins": text[:60]} for number, text in source.held_out],
            }
            for source in sources
        ],
        "init_from": _init_from(run),
    }


def _init_from(run: Path) -> dict[str, Any] | None:
    """The model that `run` began from and, where it says so itself, how that was trained."""
    name = read_json(run / SETTINGS)["init_from"]
    earlier = read_json(run / EARLIER) if (run / EARLIER).is_file() else None
    return None if name is None else {"fingerprint": name, "training": earlier}


def _measured(
    run: Path, losses: Mapping[str, float], recipe: Recipe, sources: Sequence[Text]
) -> dict[str, dict[str, float]]:
    """The last held-out losses, also per byte of text, in which models with different tokenizers compare."""
    tokens = load_tokens(run / TOKENS, [f"{source.name}/held_out" for source in sources], recipe)
    measured = {}
    for source in sources:
        loss = losses[source.name]
        bytes_of_text = sum(len(text.encode()) for _, text in source.held_out)
        tokens_per_byte = len(tokens[f"{source.name}/held_out"]) / bytes_of_text
        measured[source.name] = {
            "nats_per_token": round(loss, 4),
            "perplexity": round(float(np.exp(loss)), 2),
            "bits_per_byte": round(loss * tokens_per_byte / float(np.log(2)), 4),
        }
    return measured
