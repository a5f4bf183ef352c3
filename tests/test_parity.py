"""Logits and greedy tokens against transformers' own PyTorch models, on tiny random checkpoints of every variant."""

import json
from pathlib import Path

import numpy as np
import pytest

import coreinfer_jax as ci

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

TOLERANCE = 1e-4
TINY_OPT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "init_std": 0.2,
}
TINY_LLAMA = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OPT_VARIANTS = {
    "pre-norm": {},
    "post-norm": {"do_layer_norm_before": False},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "projected-pre-norm": {"word_embed_proj_dim": 16},
    "no-final-norm": {"_remove_final_layer_norm": True},
    "no-bias": {"enable_bias": False},
}
LLAMA_VARIANTS = {
    "multi-head": {},
    "grouped-query": {"num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention-bias": {"attention_bias": True, "num_key_value_heads": 2},
    "mlp-bias": {"mlp_bias": True},
    "head-dim": {"head_dim": 16, "num_key_value_heads": 2},
    "relu": {"hidden_act": "relu"},
    "gelu": {"hidden_act": "gelu"},
    "gelu-tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "rope-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "rope-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "rope-llama3": {"rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 2},
}
MISTRAL_VARIANTS = {
    "window": {"num_key_value_heads": 2, "sliding_window": 8},
    "no-window": {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 16},
}
QWEN2_VARIANTS = {
    "windows": {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
}
QWEN3_VARIANTS = {
    "windows": {"num_key_value_heads": 2, "head_dim": 16, "use_sliding_window": True, "sliding_window": 8}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "attention-bias": {"num_key_value_heads": 2, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
}
TINY_GEMMA = {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}
GEMMA2_VARIANTS = {
    "caps": TINY_GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "no-caps": TINY_GEMMA
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True}
    | {"hidden_activation": "gelu", "tie_word_embeddings": False},
}
GEMMA3_VARIANTS = {
    "windows": TINY_GEMMA
    | {"layer_types": ["sliding_attention", "full_attention"]}
    | {"rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}},
    "cap": TINY_GEMMA | {"final_logit_softcapping": 3.0, "attention_bias": True, "tie_word_embeddings": False},
}
SMOLLM3_VARIANTS = {
    "windows": {"num_key_value_heads": 2, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 8},
    "interval": {"num_key_value_heads": 2, "no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True},
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.25],
    "long_factor": [1.5, 4.0],
    "original_max_position_embeddings": 64,
}
PHI3_VARIANTS = {
    "longrope": {"num_key_value_heads": 2, "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.5}}
    | {"original_max_position_embeddings": 64, "sliding_window": 8},
    "plain": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}
BAMBOO_VARIANTS = {
    "drelu": {"num_key_value_heads": 2, "sliding_window": 8, "hidden_act": "relu"},
}
# By transformers' prefix of the family's classes.
FAMILIES = {
    "OPT": OPT_VARIANTS,
    "Llama": LLAMA_VARIANTS,
    "Mistral": MISTRAL_VARIANTS,
    "Qwen2": QWEN2_VARIANTS,
    "Qwen3": QWEN3_VARIANTS,
    "Gemma2": GEMMA2_VARIANTS,
    "Gemma3": GEMMA3_VARIANTS,
    "SmolLM3": SMOLLM3_VARIANTS,
    "Phi3": PHI3_VARIANTS,
    "Bamboo": BAMBOO_VARIANTS,
}
# The first variant of a family has all of its parts, but for these; what else they vary is slow.
QUICK = {"OPT": ("post-norm", "350m"), "Llama": ("grouped-query", "tied", "relu", "rope-llama3")}
VARIANTS = [
    pytest.param(
        family,
        changes,
        id=f"{family}-{name}".lower(),
        marks=[] if i == 0 or name in QUICK.get(family, ()) else [pytest.mark.slow],
    )
    for family, variants in FAMILIES.items()
    for i, (name, changes) in enumerate(variants.items())
]


def random_reference(family: str, changes: dict[str, object], directory: Path):
    """A random transformers model, saved to `directory`; biases and norm scales are random too, not 0 and 1."""
    torch.manual_seed(0)
    fields = (TINY_OPT if family == "OPT" else TINY_LLAMA) | changes
    config, kind = {"Gemma3": ("Gemma3Text", "Gemma3"), "Bamboo": ("Mistral", "Mistral")}.get(family, (family, family))
    # Written out: some releases leave Gemma's cap of scores away where they fuse attention.
    config = getattr(transformers, f"{config}Config")(**fields, attn_implementation="eager")
    model = as_family(getattr(transformers, f"{kind}ForCausalLM")(config).eval(), family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(
                    torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name and "bias" not in name else 0.0)
                )
    model.save_pretrained(directory)
    if family == "Bamboo":
        config = json.loads((directory / "config.json").read_text())
        config |= {"model_type": "bamboo", "architectures": ["BambooForCausalLM"]}
        (directory / "config.json").write_text(json.dumps(config))
    return model


def as_family(model, family: str):
    """`model`, and for Bamboo, which transformers lacks, Mistral with the MLP of its model card."""
    for layer in model.model.layers if family == "Bamboo" else ():
        layer.mlp.forward = lambda x, m=layer.mlp: m.down_proj(m.act_fn(m.gate_proj(x)) * m.act_fn(m.up_proj(x)))
    return model


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_logits_and_greedy_tokens_equal_transformers(family: str, changes: dict[str, object], tmp_path: Path) -> None:
    model = random_reference(family, changes, tmp_path)
    params, _ = ci.load(tmp_path, "float32")
    tokens = np.random.default_rng(1).integers(3, 99, (2, 40))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
        greedy = model.generate(
            torch.tensor(tokens), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        ).numpy()
    np.testing.assert_allclose(np.asarray(ci.forward(params, tokens)), expected, rtol=0, atol=TOLERANCE)
    ours = ci.generate(params, tokens, core=None, max_new_tokens=20)
    assert_same_until_a_tie(model, ours.tokens, greedy, prompt=tokens.shape[1])


def assert_same_until_a_tie(model, ours: np.ndarray, theirs: np.ndarray, prompt: int) -> None:
    """Tokens are equal; where they part, the reference's two best logits were closer than the tolerance there."""
    for new, whole in zip(ours, theirs, strict=True):
        expected = whole[prompt:]
        assert len(new) == len(expected)
        parted = np.flatnonzero(new != expected)
        if parted.size:
            with torch.no_grad():
                logits = model(torch.tensor(whole[None, : prompt + parted[0]])).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            assert best - second < TOLERANCE, (
                f"token {parted[0]} differs, though {best - second:.2e} lay between the two best"
            )


def test_tinystories_logits_equal_transformers(tinystories: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tinystories, dtype=torch.float32).eval()
    params, tokenizer = ci.load(tinystories, "float32")
    assert tokenizer is not None
    tokens = np.array([tokenizer.encode("Once upon a time, there was a little girl named Lily. She liked to play.")])
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ci.forward(params, tokens)), expected, rtol=0, atol=TOLERANCE)


def test_200_greedy_tinystories_tokens_equal_transformers(tinystories: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tinystories, dtype=torch.float32).eval()
    params, tokenizer = ci.load(tinystories, "float32")
    assert tokenizer is not None
    tokens = np.array([tokenizer.encode("Once upon a time, there was a little")])
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor(tokens), max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    ours = ci.generate(params, tokens, core=None, max_new_tokens=200)
    assert_same_until_a_tie(model, ours.tokens, theirs.numpy(), prompt=tokens.shape[1])
