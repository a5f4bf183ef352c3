"""config.json of every published spelling and size -> `ModelConfig`."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import transformers

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.io.config_json import hugging_face_fields, model_config, read_model_config
from coreinfer_jax.io.mapping import leaf_shapes
from coreinfer_jax.model.config import Rope
from coreinfer_jax.model.families import FAMILIES as FAMILY_MODULES

OPT = {
    "model_type": "opt",
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
}
SIZES = {name: value for name, value in LLAMA.items() if name != "model_type"}
MISTRAL = {"model_type": "mistral", "num_key_value_heads": 8, **SIZES}
QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 8, **SIZES}
QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 8, **SIZES}
GEMMA2 = {"model_type": "gemma2", "num_key_value_heads": 8, "head_dim": 256, **SIZES}
GEMMA3 = {"model_type": "gemma3_text", "num_key_value_heads": 8, "head_dim": 256, **SIZES}
FAMILIES = {"opt": OPT, "llama": LLAMA, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3}
SMOLLM3 = {"model_type": "smollm3", "num_key_value_heads": 4, **SIZES}
PHI3 = {"model_type": "phi3", **SIZES}
BAMBOO = MISTRAL | {"model_type": "bamboo"}
FAMILIES |= {"gemma2": GEMMA2, "gemma3_text": GEMMA3, "smollm3": SMOLLM3, "phi3": PHI3, "bamboo": BAMBOO}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [4.0] * 64}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def refusal(fields: dict) -> str:
    with pytest.raises(CoreInferError) as caught:
        model_config(fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# From the OPT paper (arXiv 2205.01068), table 1; 350m's odd ones from its config on the hub.
@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "special"),
    [
        pytest.param(768, 12, 12, {}, id="125m"),
        pytest.param(1024, 24, 16, {"word_embed_proj_dim": 512, "do_layer_norm_before": False}, id="350m"),
        pytest.param(2048, 24, 32, {}, id="1.3b"),
        pytest.param(2560, 32, 32, {}, id="2.7b"),
        pytest.param(4096, 32, 32, {}, id="6.7b"),
        pytest.param(5120, 40, 40, {}, id="13b"),
        pytest.param(7168, 48, 56, {}, id="30b"),
        pytest.param(9216, 64, 72, {}, id="66b"),
    ],
)
def test_published_opt_sizes(hidden, layers, heads, special):
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * hidden}
    always = {"word_embed_proj_dim": hidden, "do_layer_norm_before": True, "max_position_embeddings": 2048}
    config = model_config(OPT | sizes | always | special)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (
        hidden,
        layers,
        heads,
        heads,
    )
    assert (config.mlp_size, config.head_size * heads, config.max_positions) == (4 * hidden, hidden, 2048)
    assert (config.activation, config.norm_eps, config.rope) == ("relu", 1e-5, None)
    assert config.embed_size == special.get("word_embed_proj_dim", hidden)
    assert config.norm_first == config.final_norm == (not special)
    assert config.tied
    assert config.attention_bias
    assert config.mlp_bias


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param(
            {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
            {"num_kv_heads": 32, "head_size": 128, "mlp_size": 11008, "max_positions": 4096, "tied": False},
            id="2-7b",
        ),
        pytest.param(
            {
                "hidden_size": 8192,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "intermediate_size": 28672,
                "rms_norm_eps": 1e-5,
            },
            {"num_layers": 80, "num_heads": 64, "num_kv_heads": 8, "head_size": 128, "mlp_size": 28672},
            id="2-70b",
        ),
        pytest.param(
            {
                "vocab_size": 128256,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
                "rope_scaling": LLAMA3_ROPE,
                "eos_token_id": [128001, 128008, 128009],
            },
            {
                "vocab_size": 128256,
                "num_kv_heads": 8,
                "max_positions": 131072,
                "rope": Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
                "eos_ids": (128001, 128008, 128009),
            },
            id="3.1-8b",
        ),
        pytest.param(
            {
                "hidden_size": 2048,
                "num_hidden_layers": 16,
                "intermediate_size": 8192,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "tie_word_embeddings": True,
                "rms_norm_eps": 1e-5,
                "rope_parameters": LLAMA3_ROPE | {"factor": 32.0, "rope_theta": 500000.0},
            },
            {
                "hidden_size": 2048,
                "num_layers": 16,
                "head_size": 64,
                "tied": True,
                "rope": Rope(500000.0, "llama3", 32.0, 1.0, 4.0, 8192),
            },
            id="3.2-1b",
        ),
    ],
)
def test_published_llama_shapes(fields, expected):
    config = model_config(LLAMA | fields)
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.activation, config.norm_eps, config.embed_size) == ("silu", 1e-5, config.hidden_size)
    assert (config.norm_first, config.final_norm, config.attention_bias, config.mlp_bias) == (True, True, False, False)


@pytest.mark.parametrize("kind_key", ["rope_type", "type"])
@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        ({"rope_type": "default"}, Rope(5e5)),
        ({"rope_type": "linear", "factor": 2.0}, Rope(5e5, "linear", 2.0)),
        (LLAMA3_ROPE, Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)),
    ],
    ids=["default", "linear", "llama3"],
)
def test_both_rotary_spellings_mean_the_same(scaling, rope, kind_key):
    old = {kind_key if name == "rope_type" else name: value for name, value in scaling.items()}
    version_4 = model_config(LLAMA | {"rope_theta": 5e5, "rope_scaling": old})
    version_5 = model_config(LLAMA | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    assert version_4 == version_5
    assert version_4.rope == rope


def test_no_scaling_is_spelled_null_or_not_at_all():
    assert model_config(LLAMA | {"rope_scaling": None, "rope_parameters": None}) == model_config(LLAMA)


# What transformers' OPTConfig and LlamaConfig take for absent fields.
@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "opt",
            {"max_positions": 2048, "embed_size": 768, "tied": True, "norm_first": True, "final_norm": True}
            | {"attention_bias": True, "mlp_bias": True, "num_kv_heads": 12, "head_size": 64, "norm_eps": 1e-5},
        ),
        (
            "llama",
            {"max_positions": 2048, "tied": False, "activation": "silu", "norm_eps": 1e-6, "rope": Rope(10_000.0)}
            | {"attention_bias": False, "mlp_bias": False, "num_kv_heads": 32, "head_size": 128, "windows": ()},
        ),
        (
            "mistral",
            {"max_positions": 131072, "tied": False, "activation": "silu", "norm_eps": 1e-6, "rope": Rope(10_000.0)}
            | {"head_size": 128, "windows": (4096,) * 32},
        ),
        ("qwen2", {"max_positions": 32768, "tied": False, "attention_bias": True, "windows": (), "head_size": 128}),
        (
            "gemma2",
            {"max_positions": 8192, "tied": True, "activation": "gelu_tanh", "rope": Rope(10_000.0), "score_cap": 50.0}
            | {"logit_cap": 30.0, "query_scalar": 256, "windows": 16 * (4096, None), "local_rope": None},
        ),
        (
            "gemma3_text",
            {"max_positions": 131072, "tied": True, "activation": "gelu_tanh", "rope": Rope(1e6), "score_cap": None}
            | {"logit_cap": None, "query_scalar": 256, "local_rope": Rope(10_000.0)}
            | {"windows": 5 * (*5 * (4096,), None) + (4096, 4096)},
        ),
        (
            "smollm3",
            {"max_positions": 32768, "tied": True, "rope": Rope(2e6), "windows": ()}
            | {"rotated": 8 * (True, True, True, False), "attention_bias": False, "mlp_bias": False},
        ),
        (
            "phi3",
            {"max_positions": 4096, "tied": False, "norm_eps": 1e-5, "rope": Rope(10_000.0), "windows": ()}
            | {"num_kv_heads": 32, "head_size": 128},
        ),
        ("bamboo", {"max_positions": 131072, "activation": "silu", "activates_up": True, "windows": (4096,) * 32}),
        ("qwen3", {"max_positions": 32768, "tied": False, "attention_bias": False, "windows": (), "head_size": 128}),
    ],
)
def test_defaults(family, expected):
    config = model_config(FAMILIES[family])
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.bos_id, config.eos_ids, config.pad_id) == (None, (), None)


@pytest.mark.parametrize("family", FAMILIES)
def test_null_counts_as_absent(family):
    optional = ("max_position_embeddings", "num_key_value_heads", "head_dim", "word_embed_proj_dim", "eos_token_id")
    assert model_config(dict.fromkeys(optional) | FAMILIES[family]) == model_config(FAMILIES[family])


@pytest.mark.parametrize(
    ("family", "fields", "config_fields"),
    [
        ("opt", {"enable_bias": False}, {"attention_bias": False, "mlp_bias": False}),
        ("opt", {"_remove_final_layer_norm": True}, {"final_norm": False, "norm_first": True}),
        ("opt", {"tie_word_embeddings": False}, {"tied": False}),
        ("llama", {"attention_bias": True}, {"attention_bias": True, "mlp_bias": False}),
        ("llama", {"mlp_bias": True}, {"attention_bias": False, "mlp_bias": True}),
        ("llama", {"hidden_act": "relu"}, {"activation": "relu"}),
        (
            "llama",
            {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
            {"bos_id": 1, "eos_ids": (2,), "pad_id": 0},
        ),
    ],
)
def test_fields_that_are_implemented(family, fields, config_fields):
    config = model_config(FAMILIES[family] | fields)
    assert {name: getattr(config, name) for name in config_fields} == config_fields


NOT_IMPLEMENTED = [
    ("opt", "activation_function", "gelu"),
    ("opt", "layer_norm_elementwise_affine", False),
    ("opt", "quantization_config", {"bits": 4}),
    ("opt", "auto_map", {"AutoModel": "modeling.Mine"}),
    ("opt", "is_encoder_decoder", True),
    ("opt", "add_cross_attention", True),
    ("opt", "architectures", ["OPTForSequenceClassification"]),
    ("llama", "quantization_config", {"quant_method": "gptq"}),
    ("llama", "hidden_act", "gelu_fast"),
    ("llama", "partial_rotary_factor", 0.5),
    ("llama", "sliding_window", 4096),
    ("llama", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
    ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("llama", "rope_scaling", {"rope_type": "longrope"}),
    ("llama", "rope_scaling", {"rope_type": "linear"}),
    ("llama", "rope_scaling", {"rope_type": "linear", "factor": "two"}),
    ("llama", "rope_parameters", {"rope_type": "llama3", "factor": 8.0}),
    ("llama", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25}),
    ("llama", "rope_scaling", "linear"),
    ("llama", "rope_scaling", {"rope_type": "default", "mrope_section": [16, 24, 24]}),
    ("llama", "rope_interleaved", True),
    # What nobody here knows, from models that are LLaMA but for this.
    ("llama", "attn_logit_softcapping", 50.0),
    ("llama", "use_qk_norm", True),
    ("llama", "embedding_multiplier", 12.0),
    ("llama", "no_rope_layers", [1, 1, 1, 0]),
    ("llama", "num_local_experts", 8),
    ("mistral", "attention_bias", True),
    ("mistral", "layer_types", 32 * ["full_attention"]),
    ("mistral", "num_hidden_layers", 10_001),
    ("mistral", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("qwen2", "max_window_layers", -1),
    ("qwen2", "layer_types", 32 * ["chunked_attention"]),
    ("qwen2", "layer_types", 31 * ["full_attention"]),
    ("qwen2", "rope_scaling", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    ("qwen3", "layer_types", 32 * ["sliding_attention"]),
    ("qwen3", "layer_types", "full_attention"),
    ("qwen3", "num_experts", 128),
    ("smollm3", "no_rope_layers", 31 * [1]),
    ("smollm3", "no_rope_layers", 32 * [2]),
    ("smollm3", "layer_types", 32 * ["sliding_attention"]),
    ("phi3", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ("phi3", "rope_scaling", LONGROPE),
    ("phi3", "rope_scaling", LONGROPE | {"original_max_position_embeddings": 4096.5}),
    ("phi3", "rope_scaling", LONGROPE | {"original_max_position_embeddings": 4096, "short_mscale": 1.2}),
    ("phi3", "auto_map", {"AutoModelForCausalLM": "modeling.Mine"}),
    ("phi3", "partial_rotary_factor", 0.001),
    ("phi3", "rope_parameters", LONGROPE | {"original_max_position_embeddings": 4096, "long_factor": [1.0]}),
    ("phi3", "rope_parameters", LONGROPE | {"original_max_position_embeddings": 4096, "attention_factor": "high"}),
    ("phi3", "partial_rotary_factor", 1.5),
    ("phi3", "attention_bias", True),
    ("llama", "rope_scaling", LONGROPE | {"original_max_position_embeddings": 4096}),
    ("bamboo", "auto_map", {"AutoModelForCausalLM": "modeling.Mine"}),
    ("bamboo", "use_qk_norm", True),
    ("gemma2", "use_bidirectional_attention", True),
    ("gemma2", "hidden_activation", "gelu_fast"),
    ("gemma2", "hidden_act", "gelu"),
    ("gemma2", "sliding_window", None),
    ("gemma2", "sliding_window_size", 4095),
    ("gemma2", "sliding_window_pattern", 2),
    ("gemma3_text", "attn_logit_softcapping", 50.0),
    ("gemma3_text", "_sliding_window_pattern", 2),
    ("gemma3_text", "rope_parameters", {"rope_type": "default", "rope_theta": 1e6}),
    ("gemma3_text", "rope_parameters", {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
    ("gemma3_text", "rope_parameters", {"full_attention": {"rope_type": "yarn", "factor": 2.0}}),
    ("gemma3_text", "rope_parameters", 1e6),
    ("opt", "scale_embeddings", True),
    ("opt", "head_dim", 32),
    ("opt", "my_note", "trained at home"),
    ("llama", "architectures", ["LlamaForSequenceClassification"]),
]


@pytest.mark.parametrize(("family", "field", "value"), NOT_IMPLEMENTED)
def test_what_changes_the_computation_is_refused(family, field, value):
    assert field in refusal(FAMILIES[family] | {field: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_wrong_is_named_in_one_error(family):
    wrong = {field: value for name, field, value in NOT_IMPLEMENTED if name == family}
    wrong = {field: wrong[field] for field in wrong if field not in ("rope_parameters", "num_hidden_layers")}
    message = refusal({"model_type": family, "vocab_size": 0} | wrong)
    named = [*wrong, "vocab_size=0", "missing hidden_size", "num_hidden_layers", "num_attention_heads"]
    assert [name for name in named if name not in message] == []


@pytest.mark.parametrize(
    "harmless",
    [
        {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.5, "init_std": 0.02},
        {"torch_dtype": "float16", "dtype": "bfloat16", "use_cache": False, "transformers_version": "4.21.0"},
        {"quantization_config": None, "use_qk_norm": None, "is_encoder_decoder": False, "pruned_heads": {}},
        {"id2label": {"0": "yes"}, "do_sample": True, "temperature": 0.6, "max_length": 99, "unsloth_version": "2024"},
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_harmless_fields_are_ignored(family, harmless):
    assert model_config(FAMILIES[family] | harmless) == model_config(FAMILIES[family])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bamboo"])  # which transformers lacks
def test_what_transformers_takes_for_granted_may_be_stated(family):
    """All fields of transformers' own configuration at their defaults; sizes and ids are the family's here."""
    usual = transformers.AutoConfig.for_model(family).to_dict()
    stated = usual | FAMILIES[family] | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    derived = ("head_dim", "num_key_value_heads", "word_embed_proj_dim")
    stated |= {name: FAMILIES[family].get(name) for name in derived}
    fewer = {"num_hidden_layers": usual["num_hidden_layers"]}  # which `layer_types` belong to
    assert model_config(stated | fewer) == model_config(FAMILIES[family] | fewer)


@pytest.mark.parametrize(("field", "value"), [("partial_rotary_factor", 1.0), ("rope_interleaved", False)])
def test_what_is_computed_may_be_stated(field, value):
    assert model_config(LLAMA | {field: value}) == model_config(LLAMA)


def test_many_unknown_fields_are_one_readable_line():
    assert len(refusal(LLAMA | {f"unknown_{i}": "x" * 1000 for i in range(10_000)})) < 10_000


PHI3_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
# sqrt(1 + ln 32 / ln 4096), by the rule of LongRoPE's release.
MINI_ROPE = Rope(1e4, "longrope", original_max_positions=4096, attention_factor=1.1902380714238083)
# The keys of published files, with values that are theirs or as harmless.
PUBLISHED = {
    "opt-6.7b": OPT
    | {"_name_or_path": "facebook/opt-6.7b", "_remove_final_layer_norm": False, "activation_dropout": 0.0}
    | {"activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2}
    | {"do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "init_std": 0.02, "layerdrop": 0.0}
    | {"max_position_embeddings": 2048, "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16"}
    | {"transformers_version": "4.21.0.dev0", "use_cache": True, "word_embed_proj_dim": 768}
    | {"enable_bias": True, "layer_norm_elementwise_affine": True},
    "llama-7b": LLAMA
    | {"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu"}
    | {"initializer_range": 0.02, "max_sequence_length": 2048, "pad_token_id": -1, "rms_norm_eps": 1e-06}
    | {"torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": True},
    "llama-3.2-1b": LLAMA
    | {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000}
    | {"eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False}
    | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05}
    | {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}
    | {"transformers_version": "4.45.0.dev0", "use_cache": True},
    "tinyllama-1.1b": LLAMA
    | {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2}
    | {"hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 2048, "num_key_value_heads": 4}
    | {"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0}
    | {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": True},
    "smollm2-135m": LLAMA
    | {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1}
    | {"eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.041666666666666664, "is_llama_config": True}
    | {"max_position_embeddings": 8192, "mlp_bias": False, "num_key_value_heads": 8, "pad_token_id": 2}
    | {"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None}
    | {"rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True}
    | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "transformers_version": "4.42.3"},
    "qwen2.5-7b": QWEN2
    | {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "hidden_act": "silu"}
    | {"eos_token_id": 151643, "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944}
    | {"max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28}
    | {"num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072}
    | {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True}
    | {"use_mrope": False, "use_sliding_window": False, "vocab_size": 152064},
    "qwen3-8b": QWEN3
    | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128}
    | {"bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 4096}
    | {"initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960}
    | {"max_window_layers": 36, "num_hidden_layers": 36, "rms_norm_eps": 1e-06, "rope_scaling": None}
    | {"rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    | {"transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936},
    "gemma-2-9b": GEMMA2
    | {"architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2}
    | {"attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "eos_token_id": 1, "head_dim": 256}
    | {"final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    | {"hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192}
    | {"num_attention_heads": 16, "num_hidden_layers": 42, "pad_token_id": 0, "query_pre_attn_scalar": 256}
    | {"rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096}
    | {"torch_dtype": "float32", "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 256000},
    "gemma-3-1b": GEMMA3
    | {"architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2}
    | {"attn_logit_softcapping": None, "cache_implementation": "hybrid", "eos_token_id": [1, 106], "head_dim": 256}
    | {"final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152}
    | {"initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768, "pad_token_id": 0}
    | {"num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256}
    | {"rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000}
    | {"sliding_window": 512, "sliding_window_pattern": 6, "torch_dtype": "bfloat16", "use_cache": True}
    | {"transformers_version": "4.50.0.dev0", "vocab_size": 262144},
    "gemma-3-270m": GEMMA3
    | {"_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False}
    | {"attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256}
    | {"final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640}
    | {"initializer_range": 0.02, "intermediate_size": 2048, "max_position_embeddings": 32768, "pad_token_id": 0}
    | {"layer_types": 3 * (5 * ["sliding_attention"] + ["full_attention"]), "num_attention_heads": 4}
    | {"num_hidden_layers": 18, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06}
    | {"rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": 512}
    | {"torch_dtype": "bfloat16", "transformers_version": "4.55.0.dev0", "use_bidirectional_attention": False}
    | {"use_cache": True, "vocab_size": 262144},
    "smollm3-3b": SMOLLM3
    | {"architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu"}
    | {"bos_token_id": 128000, "eos_token_id": 128012, "hidden_size": 2048, "initializer_range": 0.02}
    | {"intermediate_size": 11008, "layer_types": 36 * ["full_attention"], "max_position_embeddings": 65536}
    | {"max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": 9 * [1, 1, 1, 0]}
    | {"num_attention_heads": 16, "num_hidden_layers": 36, "pad_token_id": 128004, "pretraining_tp": 2}
    | {"rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None}
    | {"torch_dtype": "bfloat16", "transformers_version": "4.54.0.dev0", "use_cache": False}
    | {"use_sliding_window": False, "vocab_size": 128256},
    "phi-3-mini-128k": PHI3
    | {"_name_or_path": "Phi-3-mini-128k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_bias": False}
    | {"auto_map": PHI3_CODE, "attention_dropout": 0.0}
    | {"bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072}
    | {"initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "pad_token_id": 32000}
    | {"num_key_value_heads": 32, "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05}
    | {"rope_scaling": {"long_factor": 48 * [1.5], "short_factor": 48 * [1.25], "type": "longrope"}}
    | {"rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    | {"transformers_version": "4.40.2", "use_cache": True, "vocab_size": 32064},
    "phi-4-mini": PHI3
    | {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 199999}
    | {"embd_pdrop": 0.0, "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072}
    | {"initializer_range": 0.02, "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False}
    | {"max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24, "num_key_value_heads": 8}
    | {"original_max_position_embeddings": 4096, "pad_token_id": 199999, "partial_rotary_factor": 0.75}
    | {"resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 262144}
    | {"rope_scaling": {"long_factor": 48 * [1.5], "short_factor": 48 * [1.0], "type": "longrope"}}
    | {"tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True}
    | {"vocab_size": 200064},
    "mistral-7b-v0.1": MISTRAL
    | {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu"}
    | {"initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05}
    | {"rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    | {"transformers_version": "4.34.0.dev0", "use_cache": True},
    "mistral-7b-v0.3": MISTRAL
    | {"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    | {"hidden_act": "silu", "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768}
    | {"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False}
    | {"torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0", "use_cache": True, "vocab_size": 32768},
}
READ = {
    "phi-3-mini-128k": {"windows": (262144,) * 32, "head_size": 96, "tied": False}
    | {"rope": replace(MINI_ROPE, short_factors=(1.25,) * 48, long_factors=(1.5,) * 48)},
    "phi-4-mini": {"head_size": 128, "num_kv_heads": 8, "tied": True}
    | {"rope": replace(MINI_ROPE, part=0.75, short_factors=(1.0,) * 48, long_factors=(1.5,) * 48)},
    "smollm3-3b": {"rotated": 9 * (True, True, True, False), "windows": (), "num_kv_heads": 4, "rope": Rope(5e6)}
    | {"tied": True, "head_size": 128},
    "gemma-2-9b": {"windows": 21 * (4096, None), "num_heads": 16, "head_size": 256, "query_scalar": 256, "tied": True}
    | {"score_cap": 50.0, "logit_cap": 30.0, "activation": "gelu_tanh", "norm_plus_one": True, "rope": Rope(1e4)},
    "gemma-3-1b": {"windows": 4 * (*5 * (512,), None) + (512, 512), "num_kv_heads": 1, "eos_ids": (1, 106)}
    | {"score_cap": None, "logit_cap": None, "rope": Rope(1e6), "local_rope": Rope(1e4), "tied": True},
    "gemma-3-270m": {"windows": 3 * (*5 * (512,), None), "num_kv_heads": 1, "hidden_size": 640, "head_size": 256},
    "qwen2.5-7b": {"windows": (), "num_heads": 28, "head_size": 128, "attention_bias": True, "rope": Rope(1e6)},
    "qwen3-8b": {"windows": (), "num_kv_heads": 8, "head_size": 128, "attention_bias": False, "rope": Rope(1e6)},
    "mistral-7b-v0.1": {"windows": (4096,) * 32, "num_kv_heads": 8, "mlp_size": 14336, "rope": Rope(1e4)},
    "mistral-7b-v0.3": {"windows": (), "num_kv_heads": 8, "head_size": 128, "vocab_size": 32768, "rope": Rope(1e6)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_load(name):
    config = model_config(PUBLISHED[name])
    assert config.max_positions == PUBLISHED[name].get("max_position_embeddings", 2048)
    expected = READ.get(name, {})
    assert {fact: getattr(config, fact) for fact in expected} == expected


# As their model pages state them.
PARAMETERS = {
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "gemma-3-270m": 268_098_176,
    "smollm3-3b": 3_075_098_624,
    "phi-3-mini-128k": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name):
    assert sum(map(prod, leaf_shapes(model_config(PUBLISHED[name])).values())) == PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_for_published_models_reads_back(name):
    config = replace(model_config(PUBLISHED[name]), bos_id=None, eos_ids=(), pad_id=None)
    assert model_config(json.loads(json.dumps(hugging_face_fields(config)))) == config


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5}, Rope(5e5, "linear", 2.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, Rope(5e5, "linear", 2.0)),
    ],
)
def test_two_rotary_spellings_may_agree(fields, rope):
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert model_config(LLAMA | new | fields).rope == rope


LINEAR = {"rope_type": "linear", "factor": 2.0}
# Rotary settings of each family, all of their fields stated, in the spelling of transformers 5.
STATED_ROPES = {
    **{(family, "default"): {"rope_type": "default", "rope_theta": 5e5} for family in FAMILIES if family != "opt"},
    **{(family, "linear"): LINEAR | {"rope_theta": 5e5} for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2")},
    **{(family, "llama3"): LLAMA3_ROPE | {"rope_theta": 5e5} for family in ("llama", "mistral", "smollm3")},
    ("phi3", "longrope"): LONGROPE
    | {"type": "longrope", "rope_theta": 5e5, "original_max_position_embeddings": 4096, "factor": 4.0}
    | {"attention_factor": 1.25, "partial_rotary_factor": 1.0},
}
del STATED_ROPES["gemma3_text", "default"]  # has two rotations, and other places for them
# Fields that may also stand at the top level, beside the settings.
AT_THE_TOP = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")


def otherwise(value: object) -> object:
    """A value of the same kind that means something else."""
    if isinstance(value, str):
        return "linear" if value != "linear" else "llama3"
    return [2 * one for one in value] if isinstance(value, list) else type(value)(value / 2)


@pytest.mark.parametrize(("family", "kind"), STATED_ROPES)
def test_rotary_settings_that_stand_twice_and_agree_load(family, kind):
    settings = STATED_ROPES[family, kind]
    tops = {name: settings[name] for name in AT_THE_TOP if name in settings}
    once = model_config(FAMILIES[family] | {"rope_parameters": settings})
    assert once.rope.theta == 5e5
    for fields in ({"rope_scaling": settings}, tops, tops | {"rope_scaling": settings}):
        assert model_config(FAMILIES[family] | {"rope_parameters": settings} | fields) == once
    assert model_config(FAMILIES[family] | {"rope_parameters": settings | {"rope_type": kind, "type": kind}}) == once


@pytest.mark.parametrize(("family", "kind"), STATED_ROPES)
def test_rotary_settings_that_stand_twice_and_disagree_are_refused(family, kind):
    """Every field in turn says something else in one of its two places."""
    settings = STATED_ROPES[family, kind]
    twice = FAMILIES[family] | {"rope_parameters": settings, "rope_scaling": settings}
    for name, value in settings.items():
        for spelling in ("rope_parameters", "rope_scaling"):
            told = refusal(twice | {spelling: settings | {name: otherwise(value)}})
            assert "rope" in told or name in told
    for name in (name for name in AT_THE_TOP if name in settings):
        top = {"rope_parameters": settings, name: otherwise(settings[name])}
        assert name in refusal(FAMILIES[family] | top)
    both_names = settings | {"rope_type": kind, "type": otherwise(kind)}
    assert "keep one" in refusal(FAMILIES[family] | {"rope_parameters": both_names})


@pytest.mark.parametrize(("family", "kind"), [key for key in STATED_ROPES if key[0] != "bamboo"])
def test_rotary_settings_mean_what_they_mean_to_transformers(family, kind):
    """In whichever place each field stands: moved to the top level, or to the older spelling."""
    settings = STATED_ROPES[family, kind]
    tops = {name: settings[name] for name in ("rope_theta", "partial_rotary_factor") if name in settings}
    inner = {name: value for name, value in settings.items() if name not in tops}
    sizes = FAMILIES[family] | {"max_position_embeddings": 16384}
    for fields in ({"rope_parameters": settings}, tops | {"rope_scaling": inner}, tops | {"rope_parameters": inner}):
        theirs = transformers.AutoConfig.for_model(**sizes | fields).rope_parameters
        rope = model_config(sizes | fields).rope
        assert (rope.theta, rope.scaling) == (theirs["rope_theta"], kind.replace("default", "none"))
        if "factor" in theirs and kind != "longrope":
            assert rope.factor == theirs["factor"]
        if "original_max_position_embeddings" in theirs:
            assert rope.original_max_positions == theirs["original_max_position_embeddings"]


def test_an_original_length_that_transformers_would_not_see_is_refused():
    short = {name: value for name, value in LLAMA3_ROPE.items() if name != "original_max_position_embeddings"}
    fields = {"rope_scaling": short, "original_max_position_embeddings": 8192}
    assert "original_max_position_embeddings=8192" in refusal(LLAMA | fields)


# ---------------------------------------------------------------------------- fields that stand in another place

FULL, SLIDING = "full_attention", "sliding_attention"
TYPES = {"layer_types": 31 * [FULL] + [SLIDING]}
# Two spellings or places of one thing: those of a family, what the second may say, and what it may not.
STATED_TWICE = {
    "gemma2 activation": ("gemma2", {"hidden_activation": "gelu"}, {"hidden_act": "gelu"}, {"hidden_act": "silu"}),
    "gemma2 window": ("gemma2", {"sliding_window": 64}, {"sliding_window_size": 64}, {"sliding_window_size": 32}),
    "gemma2 usual window": ("gemma2", {}, {"sliding_window_size": 4096}, {"sliding_window_size": 32}),
    "gemma3 activation": ("gemma3_text", {}, {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "gelu"}),
    "gemma3 windows": (
        *("gemma3_text", {"layer_types": 8 * (3 * [SLIDING] + [FULL])}),
        *({"sliding_window_pattern": 4}, {"sliding_window_pattern": 6}),
    ),
    **{
        f"{family} windows": (
            *(family, TYPES | {"use_sliding_window": True, "sliding_window": 64}),
            *({"max_window_layers": 31}, {"max_window_layers": 30}),
        )
        for family in ("qwen2", "qwen3")
    },
    "smollm3 rotation": (
        *("smollm3", {"no_rope_layers": 16 * [1, 0]}),
        *({"no_rope_layer_interval": 2}, {"no_rope_layer_interval": 3}),
    ),
}


@pytest.mark.parametrize(("family", "stated", "same", "other"), STATED_TWICE.values(), ids=STATED_TWICE)
def test_fields_with_two_spellings_agree_or_are_refused(family, stated, same, other):
    once = FAMILIES[family] | stated
    assert model_config(once | same) == model_config(once)
    assert str(next(iter(other))) in refusal(once | other)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bamboo"])
def test_where_two_fields_say_the_same_transformers_reads_the_one_that_is_read_here(family):
    for of, stated, same, _ in STATED_TWICE.values():
        if of == family:
            theirs = transformers.AutoConfig.for_model(**FAMILIES[family] | stated | same)
            windows = model_config(FAMILIES[family] | stated).windows or (None,) * 32
            types = getattr(theirs, "layer_types", None) or [FULL] * 32
            assert [kind == SLIDING for kind in types] == [window is not None for window in windows]


# What other families, and files for other programs, call the fields that are read here.
OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "multi_query_group_num"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "ffn_dim": ("intermediate_size", "d_ff"),
    "max_position_embeddings": ("n_positions", "seq_length"),
    "rms_norm_eps": ("layer_norm_epsilon", "norm_eps", "layer_norm_eps"),
    "hidden_act": ("activation_function", "hidden_activation"),
    "rope_theta": ("rotary_emb_base", "rope_base"),
    "tie_word_embeddings": ("tie_embeddings",),
    "head_dim": ("kv_channels", "attention_head_size"),
    "attention_bias": ("qkv_bias", "use_bias"),
    "sliding_window": ("window_size", "attention_window"),
}
# A value of each kind of field, and one that no family has where it states none.
VALUES = {"counts": 16, "switches": True, "numbers": 0.125}


def values_of(family: str) -> dict[str, object]:
    """A value for every field that the family reads."""
    known = FAMILY_MODULES[family].fields
    kinds = {name: value for kind, value in VALUES.items() for name in getattr(known, kind)}
    return kinds | dict(known.fixed) | {name: FAMILIES[family][name] for name in known.required}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_counts_in_another_place(family):
    """Below `text_config`, where models of several kinds of input have them, each is refused, also when doubled."""
    for name, value in values_of(family).items():
        below = {"text_config": {name: value}}
        assert "text_config" in refusal(FAMILIES[family] | below)
        assert "text_config" in refusal({**FAMILIES[family], name: value} | below)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_counts_under_another_name(family):
    """Nor is it ignored: a field that the family does not know is named."""
    known = FAMILY_MODULES[family].fields.known
    for name, value in values_of(family).items():
        for other in (other for other in OTHER_NAMES.get(name, ()) if other not in known):
            assert other in refusal({**FAMILIES[family], other: value})
            moved = {key: stated for key, stated in FAMILIES[family].items() if key != name}
            assert other in refusal({**moved, other: value})


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", None, 3, ["opt"]])
def test_other_families_are_refused(model_type):
    assert repr(model_type) in refusal(OPT | {"model_type": model_type})


@pytest.mark.parametrize(("family", "field"), [(family, field) for family in FAMILIES for field in FAMILIES[family]])
def test_missing_fields_are_named(family, field):
    assert field in refusal({name: value for name, value in FAMILIES[family].items() if name != field})


@pytest.mark.parametrize("value", [0, -1, "768", True, 12.0, [768]])
@pytest.mark.parametrize(
    ("family", "field"),
    [(family, field) for family in FAMILIES for field in FAMILIES[family] if field != "model_type"]
    + [("opt", "word_embed_proj_dim"), ("llama", "num_key_value_heads"), ("llama", "head_dim")]
    + [("llama", "max_position_embeddings")],
)
def test_sizes_are_whole_numbers_above_0(family, field, value):
    assert f"{field}={value!r}" in refusal(FAMILIES[family] | {field: value})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": 4100}, "hidden_size=4100"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small'"),
        ({"rope_theta": "large"}, "rope_theta='large'"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ({"bos_token_id": [1]}, "bos_token_id=[1]"),
        ({"head_dim": 65}, "head_dim=65"),
        ({"architectures": 5}, "architectures=5"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling with a factor but without a type"),
        ({"rope_parameters": {"rope_theta": -5.0}}, "rope_parameters.rope_theta=-5.0"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}}, "together"),
        ({"rope_parameters": LLAMA3_ROPE, "rope_scaling": LLAMA3_ROPE | {"factor": 32.0}}, "together"),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta=10000.0 and 500000.0"),
    ],
)
def test_other_values_that_make_no_model(fields, named):
    assert named in refusal(LLAMA | fields)


@pytest.mark.parametrize(
    ("generation", "eos_ids"),
    [(None, (2,)), ({}, (2,)), ({"eos_token_id": 7}, (7,)), ({"eos_token_id": [7, 9]}, (7, 9))],
)
def test_eos_of_generation_config_goes_first(tmp_path: Path, generation, eos_ids):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 2}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_model_config(tmp_path).eos_ids == eos_ids
