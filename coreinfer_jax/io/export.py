"""`Params` -> a Hugging Face directory: config.json, generation_config.json, model.safetensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from convert import TABLES
from coreinfer_jax.io.mapping import DTYPES, source_names
from coreinfer_jax.model.config import ModelConfig, Rope
from coreinfer_jax.model.weights import Params, named_leaves


def write_hugging_face(directory: Path, params: Params, dtype: np.dtype) -> None:
    """Write `params`, cast to `dtype`, into an existing directory, as transformers writes such a model."""
    config = params.config
    table = TABLES[config.family]
    names = source_names(config, table)
    tensors = {
        names[leaf] if names[leaf] == table.head else f"model.{names[leaf]}": np.asarray(array).astype(dtype)
        for leaf, array in named_leaves(params)
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    ids = special_ids(config)
    stored = next(name for name, known in DTYPES.items() if known == dtype)
    _write_json(directory / "config.json", {**hugging_face_fields(config), **ids, "torch_dtype": stored})
    _write_json(directory / "generation_config.json", ids)


def hugging_face_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that say what `config` computes; `model_config` reads them back."""
    shared = {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
    }
    return shared | (_opt(config) if config.family == "opt" else _llama(config))


def special_ids(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json, and of generation_config.json, that name special tokens."""
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "pad_token_id": config.pad_id,
    }


def _opt(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"],
        "activation_function": config.activation,
        "ffn_dim": config.mlp_size,
        "word_embed_proj_dim": config.embed_size,
        "do_layer_norm_before": config.norm_first,
        "_remove_final_layer_norm": config.norm_first and not config.final_norm,
        "enable_bias": config.mlp_bias,
        "dropout": 0.0,
    }


def _llama(config: ModelConfig) -> dict[str, Any]:
    assert config.rope is not None, "a LLaMA model has rotary positions"
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": config.activation,
        "intermediate_size": config.mlp_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_scaling(config.rope),
    }


def _rope_scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }
    return scaling


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
