"""LLaMA: `LlamaForCausalLM` checkpoints. Weights are [out, in] on both sides; RoPE pairs are (i, i + H/2) on both."""

from convert.table import Table

TABLE = Table(
    tensors={
        "token_embedding": "embed_tokens.weight",  # [V, D]
        "layers.{l}.attention_norm.scale": "layers.{l}.input_layernorm.weight",
        "layers.{l}.attention.query.weight": "layers.{l}.self_attn.q_proj.weight",  # [N H, D]
        "layers.{l}.attention.query.bias": "layers.{l}.self_attn.q_proj.bias",  # biases only with attention_bias
        "layers.{l}.attention.key.weight": "layers.{l}.self_attn.k_proj.weight",  # [G H, D]
        "layers.{l}.attention.key.bias": "layers.{l}.self_attn.k_proj.bias",
        "layers.{l}.attention.value.weight": "layers.{l}.self_attn.v_proj.weight",  # [G H, D]
        "layers.{l}.attention.value.bias": "layers.{l}.self_attn.v_proj.bias",
        "layers.{l}.attention.out.weight": "layers.{l}.self_attn.o_proj.weight",  # [D, N H]
        "layers.{l}.attention.out.bias": "layers.{l}.self_attn.o_proj.bias",
        "layers.{l}.mlp_norm.scale": "layers.{l}.post_attention_layernorm.weight",
        "layers.{l}.mlp.gate.weight": "layers.{l}.mlp.gate_proj.weight",  # [F, D]
        "layers.{l}.mlp.gate.bias": "layers.{l}.mlp.gate_proj.bias",  # biases only with mlp_bias
        "layers.{l}.mlp.up.weight": "layers.{l}.mlp.up_proj.weight",  # [F, D]
        "layers.{l}.mlp.up.bias": "layers.{l}.mlp.up_proj.bias",
        "layers.{l}.mlp.down.weight": "layers.{l}.mlp.down_proj.weight",  # [D, F]
        "layers.{l}.mlp.down.bias": "layers.{l}.mlp.down_proj.bias",
        "final_norm.scale": "norm.weight",
        "unembedding": "lm_head.weight",  # [V, D], absent when tied
    },
    embedding="embed_tokens.weight",
    # Old exports carry RoPE's frequencies as buffers; they follow from the config.
    ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",),
)
