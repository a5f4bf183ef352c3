"""What a training run needs before its first step: texts, settings, tokenizer, tokens, weights to begin from."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from coreinfer_jax.errors import CoreInferError, shown, shown_name
from coreinfer_jax.files import SETTINGS, copy_existing, is_directory, new_directory, read_back, read_json, to_path
from coreinfer_jax.io.loading import load, model_path, open_model
from coreinfer_jax.lab.training.recipe import Recipe, model_config
from coreinfer_jax.lab.training.trainable import TRAINABLE
from coreinfer_jax.lab.training.windows import Text, load_tokens, read_text, tokenise, vocabulary_texts
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.model.weights import Params
from coreinfer_jax.progress import progress
from coreinfer_jax.text import TOKENIZER_FILES, load_tokenizer

TOKENS, CHECKPOINT = "tokens.safetensors", "checkpoint.safetensors"

# What a finished model says of its training, and the name a run that goes on from the model gives it.
FACTS, EARLIER = "training.json", "earlier.json"


def read_texts(texts: Sequence[str | os.PathLike[str]]) -> list[Text]:
    """The texts in files of different names.

    Raises:
        CoreInferError: none, two of one name, or one that cannot be used.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise CoreInferError(f"texts={shown(texts)}: give a list of text files")
    sources = [read_text(to_path(text)) for text in texts]
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise CoreInferError(f"texts: {', '.join(names) or 'none'}; give text files of different names")
    return sources


def prepare(
    run: Path, sources: Sequence[Text], recipe: Recipe, init_from: str | os.PathLike[str] | None
) -> Params | None:
    """Make the directory of a new run, or check that one which is there was begun with the same arguments.

    Returns:
        The float32 weights of `init_from`, None where there are none to begin from.

    Raises:
        CoreInferError: as `train`.
    """
    first = None if init_from is None else _first_weights(init_from, recipe)
    settings = {
        "recipe": asdict(recipe),
        "texts": {source.name: source.digest for source in sources},
        "init_from": None if first is None else fingerprint(first),
    }
    if is_directory(run):
        _check_settings(run, settings)
        return first
    with new_directory(run) as partial:
        if init_from is None:
            TRAINABLE[recipe.family].train_vocabulary(vocabulary_texts(sources), recipe.vocab_size, partial)
        else:
            _copy_tokenizer_and_facts(model_path(init_from), partial)
        _write_tokens(partial, sources, recipe)
        (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return first


def _first_weights(model: str | os.PathLike[str], recipe: Recipe) -> Params:
    """The weights of `model`, if `recipe` makes such models."""
    config, _ = open_model(model_path(model))
    expected, found = asdict(model_config(recipe)), asdict(config)
    differing = [
        f"{name} {found[name]} instead of {expected[name]}" for name in expected if found[name] != expected[name]
    ]
    if differing:
        raise CoreInferError(
            f"{model}: is not of the recipe's sizes ({', '.join(differing)}); give the recipe its sizes"
        )
    params, tokenizer = load(model, "float32")
    if tokenizer is None:
        raise CoreInferError(f"{model}: has no tokenizer; put the one it was trained with beside its weights")
    return params.weights


def _copy_tokenizer_and_facts(model: Path, run: Path) -> None:
    """Give a new run the tokenizer of `model`, and what is known of its training."""
    copy_existing(model, run, TOKENIZER_FILES)
    if (model / FACTS).is_file():
        (run / EARLIER).write_text(json.dumps(read_json(model / FACTS), ensure_ascii=False) + "\n", encoding="utf-8")


def _check_settings(run: Path, settings: Mapping[str, Any]) -> None:
    if not (run / SETTINGS).is_file():
        raise CoreInferError(f"{run}: exists and is no training run; name a new directory")
    before = read_json(run / SETTINGS)
    # As written, because the order of the texts decides which window is read when.
    changed = [name for name in ("texts", "init_from") if json.dumps(before.get(name)) != json.dumps(settings[name])]
    old, new = before.get("recipe"), settings["recipe"]
    if isinstance(old, dict):
        differing = [name for name in old | new if old.get(name) != new.get(name)]
        changed += [f"{shown_name(name)} {shown(old.get(name))} -> {new.get(name)!r}" for name in differing]
    else:
        changed.append("recipe")
    if changed:
        raise CoreInferError(
            f"{run}: was begun with other settings ({', '.join(changed)}); repeat them, or name a new directory"
        )


def _write_tokens(run: Path, sources: Sequence[Text], recipe: Recipe) -> None:
    """The tokens of a new run, by its tokenizer."""
    bos, eos = TRAINABLE[recipe.family].bos_id, TRAINABLE[recipe.family].eos_id
    tokenizer = load_tokenizer(run)
    assert tokenizer is not None, "the tokenizer was written just now"
    tokens = {}
    for source in progress(sources, desc="tokenising", unit="file", leave=True):
        tokens[f"{source.name}/train"] = tokenise(source.documents, tokenizer, bos, eos, recipe.vocab_size)
        tokens[f"{source.name}/held_out"] = tokenise(
            [text for _, text in source.held_out], tokenizer, bos, eos, recipe.vocab_size
        )
    for name, array in tokens.items():
        if len(array) < recipe.sequence:
            raise CoreInferError(
                f"{name}: {len(array)} tokens do not fill one window of {recipe.sequence}; give more text, or a "
                "smaller --sequence"
            )
    save_file(tokens, run / TOKENS)
    with read_back(run / TOKENS):
        load_tokens(run / TOKENS, list(tokens), recipe)
