"""GGUF files of every architecture that is read, against the checkpoints they are made of and transformers' reader."""

import re
from collections.abc import Callable
from dataclasses import replace
from math import log, sqrt
from pathlib import Path

import numpy as np
import pytest
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

import coreinfer_jax as ci
from coreinfer_jax.model.weights import named_leaves
from tests.test_parity import PHI3_VARIANTS, TOLERANCE, random_reference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

Facts = Callable[[GGUFWriter, object], None]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def base(writer: GGUFWriter, config) -> None:
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def base_and_heads(writer: GGUFWriter, config) -> None:
    base(writer, config)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def gemma2(writer: GGUFWriter, config) -> None:
    base_and_heads(writer, config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def gemma3(writer: GGUFWriter, config) -> None:
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)


def phi3(writer: GGUFWriter, config) -> None:
    base(writer, config)
    H, rope = config.hidden_size // config.num_attention_heads, config.rope_parameters
    writer.add_rope_dimension_count(int(H * rope["partial_rotary_factor"]))
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_rope_scaling_attn_factors(sqrt(1 + log(128 / 64) / log(64)))
    writer.add_sliding_window(config.sliding_window or 0)
    for which in ("short", "long"):
        writer.add_tensor(f"rope_factors_{which}.weight", np.array(rope[f"{which}_factor"], np.float32))


# By transformers' prefix: the architecture, a variant that its files can say, the metadata that llama.cpp's converter
# writes besides.
GEMMA = {"num_key_value_heads": 2, "head_dim": 256, "sliding_window": 8, "tie_word_embeddings": True}
FILES = {
    "Qwen2": ("qwen2", {"num_key_value_heads": 2}, base),
    # Heads of 128 are what transformers takes for granted in files.
    "Qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True}, base_and_heads),
    # Heads of 256 and these caps are so too.
    "Gemma2": ("gemma2", GEMMA, gemma2),
    "Gemma3": ("gemma3", GEMMA, gemma3),
    "SmolLM3": ("smollm3", {"num_key_value_heads": 2, "num_hidden_layers": 4, "attention_bias": True}, base),
    "Phi3": ("phi3", PHI3_VARIANTS["longrope"], phi3),
}

READ_BY_TRANSFORMERS = ("qwen2", "qwen3", "gemma2", "gemma3")


def write(file: Path, architecture: str, model, facts: Facts) -> None:
    """`model` as llama.cpp's converter writes it, under the names of the package gguf."""
    config, kind = model.config, next(arch for arch in MODEL_ARCH if arch.name.lower() == architecture)
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    facts(writer, config)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(theirs, stored(architecture, name, tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(architecture: str, name: str, array: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter makes of a tensor."""
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1
    if architecture == "smollm3" and re.search(r"\.[qk]_proj\.", name):
        heads = 4 if ".q_proj." in name else 2
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)
    return array


@pytest.mark.parametrize("family", FILES)
def test_a_file_is_the_checkpoint_it_was_made_of(family: str, tmp_path: Path) -> None:
    architecture, changes, facts = FILES[family]
    model = random_reference(family, changes, tmp_path / "hub")
    write(tmp_path / "model.gguf", architecture, model, facts)
    params, tokenizer = ci.load(tmp_path / "model.gguf", "float32")
    expected, _ = ci.load(tmp_path / "hub", "float32")
    assert tokenizer is None
    assert params.config == replace(expected.config, **not_in_files(params.config, expected.config))
    for (name, leaf), (_, written) in zip(named_leaves(params), named_leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, written, rtol=0, atol=3e-7, err_msg=name)  # a scale of a norm had 1 added
    if architecture not in READ_BY_TRANSFORMERS:
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    tokens = np.random.default_rng(1).integers(3, 99, (2, 20))
    with torch.no_grad():
        logits = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ci.forward(params, tokens)), logits, rtol=0, atol=TOLERANCE)


def not_in_files(config: ci.ModelConfig, expected: ci.ModelConfig) -> dict[str, object]:
    """Facts of `config` that the tests' files do not hold, or as float32 only."""
    factor = config.rope.attention_factor
    assert factor == pytest.approx(expected.rope.attention_factor, rel=1e-6)
    own = {name: getattr(config, name) for name in ("bos_id", "eos_ids", "pad_id", "norm_eps")}
    return own | {"rope": replace(expected.rope, attention_factor=factor)}
