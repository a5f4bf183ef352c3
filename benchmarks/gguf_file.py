"""LLaMA checkpoints of random weights in GGUF, the format of llama.cpp."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize

from benchmarks.shapes import Fields, shape_config
from coreinfer_jax.model.config import ModelConfig

FILE_TYPES = {
    "F16": LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
}
# Random values repeat after this many, a multiple of every quantised block.
_BLOCK = 1 << 20


def write_gguf(path: Path, fields: Fields, file_type: str) -> None:
    """A LLaMA of random weights as `file_type` (`F16`, `Q8_0`, `Q4_0`); norms are float32, as in published files."""
    config = shape_config(fields)
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(FILE_TYPES[file_type])
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    weights = _Weights(file_type)
    for name, shape in _tensors(config):
        weights.add(writer, name, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a LLaMA's tensors in GGUF."""
    D, F, V = config.hidden_size, config.mlp_size, config.vocab_size
    N_H, G_H = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    block = {
        "attn_norm": (D,),
        "attn_q": (N_H, D),
        "attn_k": (G_H, D),
        "attn_v": (G_H, D),
        "attn_output": (D, N_H),
        "ffn_norm": (D,),
        "ffn_gate": (F, D),
        "ffn_up": (F, D),
        "ffn_down": (D, F),
    }
    named = [("token_embd.weight", (V, D)), ("output_norm.weight", (D,)), ("output.weight", (V, D))]
    for l in range(config.num_layers):
        named += [(f"blk.{l}.{name}.weight", shape) for name, shape in block.items()]
    return named


class _Weights:
    """Random tensors of one type, all from one block of values."""

    def __init__(self, file_type: str) -> None:
        values = (0.02 * np.random.default_rng(0).standard_normal(_BLOCK)).astype(np.float32)
        self._type = GGMLQuantizationType[file_type]
        raw = values.astype(np.float16) if file_type == "F16" else quantize(values, self._type)
        self._bytes = raw.view(np.uint8).reshape(-1)

    def add(self, writer: GGUFWriter, name: str, shape: tuple[int, ...]) -> None:
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            return
        per_value = len(self._bytes) / _BLOCK
        rows, columns = shape
        data = np.resize(self._bytes, int(rows * columns * per_value)).reshape(rows, -1)
        if self._type == GGMLQuantizationType.F16:
            writer.add_tensor(name, data.view(np.float16))
        else:
            writer.add_tensor(name, data, raw_dtype=self._type)
