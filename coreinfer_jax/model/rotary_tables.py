"""Tables of names for decoders with rotary positions, RMSNorm and a gated MLP: in checkpoints and in GGUF files."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from coreinfer_jax.model.family import GgufFacts, GgufNames

ATTENTION = ("attention.query", "attention.key", "attention.value", "attention.out")
MLP = ("mlp.gate", "mlp.up", "mlp.down")

TENSORS = {
    "token_embedding": "embed_tokens.weight",  # [V, D]
    "layers.{l}.attention_norm.scale": "layers.{l}.input_layernorm.weight",
    "layers.{l}.attention.query.weight": "layers.{l}.self_attn.q_proj.weight",  # [N H, D]
    "layers.{l}.attention.key.weight": "layers.{l}.self_attn.k_proj.weight",  # [G H, D]
    "layers.{l}.attention.value.weight": "layers.{l}.self_attn.v_proj.weight",  # [G H, D]
    "layers.{l}.attention.out.weight": "layers.{l}.self_attn.o_proj.weight",  # [D, N H]
    "layers.{l}.mlp_norm.scale": "layers.{l}.post_attention_layernorm.weight",
    "layers.{l}.mlp.gate.weight": "layers.{l}.mlp.gate_proj.weight",  # [F, D]
    "layers.{l}.mlp.up.weight": "layers.{l}.mlp.up_proj.weight",  # [F, D]
    "layers.{l}.mlp.down.weight": "layers.{l}.mlp.down_proj.weight",  # [D, F]
    "final_norm.scale": "norm.weight",
    "unembedding": "lm_head.weight",  # [V, D], absent when tied
}

# Of every head's queries and keys, [H].
HEAD_NORMS = {
    "layers.{l}.attention.query_norm.scale": "layers.{l}.self_attn.q_norm.weight",
    "layers.{l}.attention.key_norm.scale": "layers.{l}.self_attn.k_norm.weight",
}

# Exports by old releases carry RoPE's frequencies as buffers; they follow from the config.
IGNORED_TENSORS = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",)

GGUF_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
GGUF_TENSORS = {
    "token_embedding": "token_embd.weight",
    "layers.{l}.attention_norm.scale": "blk.{l}.attn_norm.weight",
    "layers.{l}.attention.query.weight": "blk.{l}.attn_q.weight",
    "layers.{l}.attention.key.weight": "blk.{l}.attn_k.weight",
    "layers.{l}.attention.value.weight": "blk.{l}.attn_v.weight",
    "layers.{l}.attention.out.weight": "blk.{l}.attn_output.weight",
    "layers.{l}.mlp_norm.scale": "blk.{l}.ffn_norm.weight",
    "layers.{l}.mlp.gate.weight": "blk.{l}.ffn_gate.weight",
    "layers.{l}.mlp.up.weight": "blk.{l}.ffn_up.weight",
    "layers.{l}.mlp.down.weight": "blk.{l}.ffn_down.weight",
    "final_norm.scale": "output_norm.weight",
    "unembedding": "output.weight",
}
GGUF_HEAD_NORMS = {
    "layers.{l}.attention.query_norm.scale": "blk.{l}.attn_q_norm.weight",
    "layers.{l}.attention.key_norm.scale": "blk.{l}.attn_k_norm.weight",
}
GGUF_SCALING = ("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length")


def biases(tensors: Mapping[str, str], *parts: str) -> dict[str, str]:
    """Entries for the biases of `parts`, such as `attention.query`, beside their weights in the table `tensors`."""
    leaves = [f"layers.{{l}}.{part}" for part in parts]
    return {f"{leaf}.bias": tensors[f"{leaf}.weight"].removesuffix("weight") + "bias" for leaf in leaves}


def gguf_scaling(facts: GgufFacts) -> dict[str, Any]:
    """`rope_scaling` of config.json as a GGUF file's metadata states it; reading it refuses what is not implemented."""
    kind, factor = facts.metadata.get("rope.scaling.type", "none"), facts.metadata.get("rope.scaling.factor")
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return {}
    return {"rope_scaling": {"rope_type": kind, "factor": factor}}


# GGUF files of these families, unless they spell more.
rotary_gguf = partial(GgufNames, fields=GGUF_FIELDS, further_keys=GGUF_SCALING, further_fields=gguf_scaling)
