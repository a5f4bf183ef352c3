"""`Params` -> a Hugging Face directory: config.json, generation_config.json, model.safetensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from coreinfer_jax.io.config_json import hugging_face_fields
from coreinfer_jax.io.mapping import DTYPES, source_names
from coreinfer_jax.model.config_fields import write_special_ids
from coreinfer_jax.model.weights import Params, named_leaves


def write_hugging_face(directory: Path, params: Params, dtype: np.dtype) -> None:
    """Write `params`, cast to `dtype`, into an existing directory, as transformers writes such a model."""
    config = params.config
    names = source_names(config)
    parts: dict[str, list[np.ndarray]] = {}
    for leaf, array in named_leaves(params):
        name = names[leaf] if leaf == "unembedding" else f"model.{names[leaf]}"
        parts.setdefault(name, []).append(np.asarray(array).astype(dtype))
    tensors = {name: np.concatenate(rows) if len(rows) > 1 else rows[0] for name, rows in parts.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    ids = write_special_ids(config)
    stored = next(name for name, known in DTYPES.items() if known == dtype)
    _write_json(directory / "config.json", {**hugging_face_fields(config), **ids, "torch_dtype": stored})
    _write_json(directory / "generation_config.json", ids)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
