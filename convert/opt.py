"""OPT: `OPTForCausalLM` checkpoints. Weights are [out, in] on both sides."""

from convert.table import Table

TABLE = Table(
    tensors={
        "token_embedding": "decoder.embed_tokens.weight",  # [V, E]
        "position_embedding": "decoder.embed_positions.weight",  # [P + 2, D]
        "project_in.weight": "decoder.project_in.weight",  # [D, E], 350m only
        "project_out.weight": "decoder.project_out.weight",  # [E, D], 350m only
        "layers.{l}.attention_norm.scale": "decoder.layers.{l}.self_attn_layer_norm.weight",
        "layers.{l}.attention_norm.bias": "decoder.layers.{l}.self_attn_layer_norm.bias",
        "layers.{l}.attention.query.weight": "decoder.layers.{l}.self_attn.q_proj.weight",  # [D, D]
        "layers.{l}.attention.query.bias": "decoder.layers.{l}.self_attn.q_proj.bias",
        "layers.{l}.attention.key.weight": "decoder.layers.{l}.self_attn.k_proj.weight",
        "layers.{l}.attention.key.bias": "decoder.layers.{l}.self_attn.k_proj.bias",
        "layers.{l}.attention.value.weight": "decoder.layers.{l}.self_attn.v_proj.weight",
        "layers.{l}.attention.value.bias": "decoder.layers.{l}.self_attn.v_proj.bias",
        "layers.{l}.attention.out.weight": "decoder.layers.{l}.self_attn.out_proj.weight",
        "layers.{l}.attention.out.bias": "decoder.layers.{l}.self_attn.out_proj.bias",
        "layers.{l}.mlp_norm.scale": "decoder.layers.{l}.final_layer_norm.weight",
        "layers.{l}.mlp_norm.bias": "decoder.layers.{l}.final_layer_norm.bias",
        "layers.{l}.mlp.up.weight": "decoder.layers.{l}.fc1.weight",  # [F, D]
        "layers.{l}.mlp.up.bias": "decoder.layers.{l}.fc1.bias",
        "layers.{l}.mlp.down.weight": "decoder.layers.{l}.fc2.weight",  # [D, F]
        "layers.{l}.mlp.down.bias": "decoder.layers.{l}.fc2.bias",
        "final_norm.scale": "decoder.final_layer_norm.weight",  # absent in 350m
        "final_norm.bias": "decoder.final_layer_norm.bias",
        "unembedding": "lm_head.weight",  # [V, E], untied checkpoints only
    },
    embedding="decoder.embed_tokens.weight",
    ignored=(r"decoder\.version",),  # a leftover of the original training code
)
