"""Conversion holds a tensor at a time: shown on large checkpoints, as the system counts memory."""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from coreinfer_jax.io.config_json import model_config
from coreinfer_jax.io.mapping import leaf_shapes
from coreinfer_jax.model.families import FAMILIES

# A checkpoint of a gigabyte is written.
pytestmark = pytest.mark.slow

MIB, GIB = 2**20, 2**30
FIELDS = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 9,
    "num_attention_heads": 32,
}


def write_zeros(directory: Path) -> dict[str, tuple[int, ...]]:
    """A bfloat16 checkpoint of zeros in one sparse file, which takes no time and hardly any disk: leaf shapes."""
    shapes = leaf_shapes(model_config(FIELDS))
    header, end = {}, 0
    for leaf, shape in shapes.items():
        parts = leaf.split(".")
        template = leaf if parts[0] != "layers" else ".".join(["layers", "{l}", *parts[2:]])
        name = FAMILIES["llama"].tensors[template].format(l=parts[1] if parts[0] == "layers" else None)
        size = 2 * prod(shape)
        prefix = "" if name == "lm_head.weight" else "model."
        header[prefix + name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    (directory / "config.json").write_text(json.dumps(FIELDS))
    return shapes


# LLaMA-3.1-8B's embedding, which takes 2.1 GB in float32, tied, and one small layer.
V, D, F, L, N, G, H = 128_256, 4096, 1024, 1, 8, 2, 128


def write_gguf_of_zeros(file: Path, kind: GGMLQuantizationType) -> int:
    """A GGUF file of one type, sparse as well: the values of the largest tensor."""
    block = {
        "attn_norm": (D,),
        "attn_q": (N * H, D),
        "attn_k": (G * H, D),
        "attn_v": (G * H, D),
        "attn_output": (D, N * H),
        "ffn_norm": (D,),
        "ffn_gate": (F, D),
        "ffn_up": (F, D),
        "ffn_down": (D, F),
    }
    shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    shapes |= {f"blk.{l}.{name}.weight": shape for l in range(L) for name, shape in block.items()}
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(G)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(H)
    values, size = GGML_QUANT_SIZES[kind]
    end = 0
    for name, shape in shapes.items():
        stored = (*shape[:-1], shape[-1] // values * size)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), prod(stored), raw_dtype=kind)
        end += prod(stored) + -prod(stored) % 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(file, file.stat().st_size + end + 32)
    return max(prod(shape) for shape in shapes.values())


def peak_anonymous_memory(command: list[str]) -> int:
    """Largest RssAnon in bytes while `command` runs; it must succeed."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    peak = 0
    while process.poll() is None:
        lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines)])
        try:
            process.wait(0.005)
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 0
    return peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_anonymous_memory_stays_under_twice_the_largest_tensor_plus_1_gib(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shapes = write_zeros(source)
    assert (source / "model.safetensors").stat().st_size > 4e9
    destination = tmp_path / "converted"
    peak = peak_anonymous_memory([sys.executable, "-m", "convert", str(source), str(destination)])
    largest = max(2 * prod(shape) for shape in shapes.values())
    print(f"peak RssAnon {peak / MIB:.0f} MiB, largest tensor {largest / MIB:.0f} MiB")
    assert peak < 2 * largest + GIB
    assert sum(file.stat().st_size for file in destination.glob("*.safetensors")) > 4e9


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_K, GGMLQuantizationType.F32], ids=lambda kind: kind.name)
def test_so_does_that_of_gguf_files_to_a_narrower_type(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    largest = 2 * write_gguf_of_zeros(tmp_path / "model.gguf", kind)
    destination = tmp_path / "converted"
    command = [sys.executable, "-m", "convert", str(tmp_path / "model.gguf"), str(destination), "--dtype", "bfloat16"]
    peak = peak_anonymous_memory(command)
    print(f"peak RssAnon {peak / MIB:.0f} MiB, largest tensor {largest / MIB:.0f} MiB")
    assert peak < 2 * largest + GIB
    assert sum(file.stat().st_size for file in destination.glob("*.safetensors")) > 1e9
