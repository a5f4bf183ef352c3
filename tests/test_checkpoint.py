"""Hugging Face directories as the hub holds them and the native format: exact when right, one clear error when not."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import coreinfer_jax as ci
from coreinfer_jax.io import mapping, native
from coreinfer_jax.io.hub import looks_like_hub_id, needed_files
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.families import FAMILIES
from coreinfer_jax.model.weights import named_leaves
from tests.support import LLAMA, MODELS, OPT, OPT_350M_STYLE, one_quick_in, random_model

Tensors = dict[str, np.ndarray]
TIED_LLAMA = replace(LLAMA, tied=True)
FLOAT32, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


@cache
def weights(config: ModelConfig) -> Tensors:
    """Leaves of a random model by name."""
    return {name: np.asarray(leaf) for name, leaf in named_leaves(random_model(config))}


def hub_tensors(config: ModelConfig) -> Tensors:
    """`weights` under the names transformers saves today."""
    table = FAMILIES[config.family].tensors
    names = {ours.format(l=l): theirs.format(l=l) for ours, theirs in table.items() for l in range(config.num_layers)}
    prefixed = {leaf: name if leaf == "unembedding" else f"model.{name}" for leaf, name in names.items()}
    return {prefixed[leaf]: array for leaf, array in weights(config).items()}


def config_fields(config: ModelConfig) -> dict:
    """The config.json of `config`."""
    fields = {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "pad_token_id": config.pad_id,
    }
    if config.family == "opt":
        return fields | {
            "ffn_dim": config.mlp_size,
            "word_embed_proj_dim": config.embed_size,
            "do_layer_norm_before": config.norm_first,
        }
    return fields | {
        "intermediate_size": config.mlp_size,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": config.activation,
    }


def save_safetensors(tensors: Tensors, file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})


def write_hub(
    directory: Path,
    config: ModelConfig,
    tensors: Tensors,
    shards: int = 1,
    index: bool = False,
    save: Callable[[Tensors, Path], None] = save_safetensors,
    stem: str = "model",
    suffix: str = "safetensors",
) -> Path:
    """A Hugging Face directory of `tensors`, whole or in shards, with an index or without."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_fields(config)))
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}" if shards > 1 else f"{stem}.{suffix}"
        save({name: tensors[name] for name in names[i::shards]}, directory / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    if index:
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A faultless checkpoint, for tests to damage."""
    return write_hub(tmp_path / "hub", OPT, hub_tensors(OPT))


def assert_leaves(params: ci.Params, expected: Tensors, dtype: np.dtype = FLOAT32) -> None:
    leaves = dict(named_leaves(params))
    assert leaves.keys() == expected.keys()
    assert {leaf.dtype for leaf in leaves.values()} == {dtype}
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(np.asarray(leaf), expected[name].astype(dtype), err_msg=name)


def refusal(source: Path, dtype: object = None) -> str:
    """The one line with which `load` and `convert` both refuse `source`; the conversion must leave nothing behind."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(ci.CoreInferError) as loading:
        ci.load(source, dtype)
    with pytest.raises(ci.CoreInferError) as converting:
        ci.convert(source, source.parent / "native", dtype)
    assert str(loading.value) == str(converting.value)
    assert "\n" not in str(loading.value)
    assert sorted(source.parent.iterdir()) == before
    return str(loading.value)


@dataclass
class Spelling:
    """How a checkpoint on the hub differs from what transformers saves today."""

    config: ModelConfig
    edit: Callable[[Tensors], Tensors] = dict
    save: Callable[[Tensors, Path], None] = save_safetensors
    shards: int = 1
    index: bool = False


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): array for name, array in tensors.items()}


def with_frequencies(tensors: Tensors) -> Tensors:
    frequencies = np.ones(4, np.float32)
    return tensors | {f"model.layers.{l}.self_attn.rotary_emb.inv_freq": frequencies for l in range(3)}


def with_model_frequencies(tensors: Tensors) -> Tensors:
    return tensors | {"model.rotary_emb.inv_freq": np.ones(4, np.float32)}


def with_version(tensors: Tensors) -> Tensors:
    return tensors | {"model.decoder.version": np.array([3.0], np.float32)}


def with_head_copy(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": next(a for n, a in tensors.items() if "embed_tokens" in n).copy()}


def head_for_embedding(tensors: Tensors) -> Tensors:
    return {"lm_head.weight" if "embed_tokens" in name else name: array for name, array in tensors.items()}


def save_with_alias(tensors: Tensors, file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt", "model.embed_tokens.weight": "lm_head.weight"})


SPELLINGS = {f"{name} of today": Spelling(config) for name, config in MODELS.items()} | {
    "opt without the leading model.": Spelling(OPT, without_prefix),
    "opt with a version": Spelling(OPT, with_version),
    "llama with frequencies of the whole model": Spelling(LLAMA, with_model_frequencies),
    "opt with a copy for lm_head": Spelling(OPT, with_head_copy),
    "opt untied": Spelling(replace(OPT, tied=False)),
    "350m without the leading model.": Spelling(OPT_350M_STYLE, without_prefix),
    "llama with rotary frequencies": Spelling(LLAMA, with_frequencies),
    "llama without the leading model.": Spelling(LLAMA, without_prefix),
    "llama tied without lm_head": Spelling(TIED_LLAMA),
    "llama tied with a copy for lm_head": Spelling(TIED_LLAMA, with_head_copy),
    "llama tied with lm_head only": Spelling(TIED_LLAMA, head_for_embedding),
    "llama tied with an alias": Spelling(TIED_LLAMA, head_for_embedding, save_with_alias),
    "shards and an index": Spelling(LLAMA, shards=3, index=True),
    "shards without an index": Spelling(LLAMA, shards=3),
    "an index of one file": Spelling(LLAMA, index=True),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_loads_and_converts_exactly(tmp_path, spelling):
    config, tensors = spelling.config, spelling.edit(hub_tensors(spelling.config))
    hub = write_hub(tmp_path / "hub", config, tensors, spelling.shards, spelling.index, spelling.save)
    for directory in (hub, ci.convert(hub, tmp_path / "native")):
        params, tokenizer = ci.load(directory, "float32")
        assert params.config == config
        assert tokenizer is None
        assert_leaves(params, weights(config))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
def test_casts_equal_numpys(tmp_path, hub, dtype):
    converted = ci.convert(hub, tmp_path / "native", dtype.name)
    for directory in (hub, converted):
        assert_leaves(ci.load(directory, dtype.name)[0], weights(OPT), dtype)
    rounded = {name: array.astype(dtype) for name, array in weights(OPT).items()}
    assert_leaves(ci.load(converted, "float32")[0], rounded)


@pytest.mark.parametrize(("chunk", "stored"), one_quick_in(3, [1, 33, 500], [FLOAT32, FLOAT16, BFLOAT16]), ids=str)
def test_large_tensors_are_read_by_rows(tmp_path, monkeypatch, stored, chunk):
    monkeypatch.setattr(mapping, "CHUNK", chunk)
    tensors = {name: array.astype(stored) for name, array in hub_tensors(OPT).items()}
    rounded = {name: array.astype(stored) for name, array in weights(OPT).items()}
    hub = write_hub(tmp_path / "hub", OPT, tensors)
    for dtype in (FLOAT32, FLOAT16, BFLOAT16):
        assert_leaves(ci.load(hub, dtype.name)[0], rounded, dtype)
    tensors["model.decoder.layers.1.fc1.weight"][95, 31] = np.nan
    message = refusal(write_hub(tmp_path / "damaged", OPT, tensors))
    assert "layers.1.mlp.up.weight holds NaN or infinity" in message


@pytest.mark.parametrize("stored", [np.dtype(np.float64), FLOAT16, BFLOAT16], ids=str)
def test_stored_dtypes(tmp_path, stored):
    tensors = {name: array.astype(stored) for name, array in hub_tensors(OPT).items()}
    hub = write_hub(tmp_path / "hub", OPT, tensors)
    rounded = {name: array.astype(stored) for name, array in weights(OPT).items()}
    assert_leaves(ci.load(hub, "float32")[0], rounded)
    kept = FLOAT32 if stored == np.float64 else stored
    shards = sorted(ci.convert(hub, tmp_path / "native").glob("*.safetensors"))
    assert {array.dtype for shard in shards for array in load_file(shard).values()} == {kept}


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, BFLOAT16, jnp.zeros((), jnp.bfloat16).dtype])
def test_spellings_of_a_dtype(hub, dtype):
    assert ci.load(hub, dtype)[0].token_embedding.dtype == BFLOAT16


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", FLOAT32), ("gpu", BFLOAT16), ("tpu", BFLOAT16)])
def test_the_default_dtype_suits_the_device(hub, monkeypatch, backend, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert_leaves(ci.load(hub)[0], weights(OPT), dtype)


@pytest.mark.parametrize(
    "dtype", ["int8", "fp32", "", np.int32, float, 8, object()], ids=lambda dtype: repr(dtype)[:12]
)
def test_other_dtypes_are_refused(hub, dtype):
    message = refusal(hub, dtype)
    assert message.startswith("dtype=")
    assert "give float32, bfloat16, float16" in message


def test_conversion_keeps_tokenizer_and_configs(tmp_path, hub):
    kept = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for name in kept[1:]:
        (hub / name).write_text(json.dumps({"eos_token_id": 7, "from": name}))
    (hub / "README.md").write_text("no part of the model")
    converted = ci.convert(str(hub), str(tmp_path / "native"))
    assert [(converted / name).read_bytes() for name in kept] == [(hub / name).read_bytes() for name in kept]
    assert not (converted / "README.md").exists()
    assert native.open_native(converted)[0].eos_ids == (7,)


def test_tied_output_projection_must_equal_the_embedding(tmp_path):
    tensors = with_head_copy(hub_tensors(TIED_LLAMA))
    tensors["lm_head.weight"][3, 5] += 1e-3
    message = refusal(write_hub(tmp_path / "hub", TIED_LLAMA, tensors))
    assert "tie_word_embeddings is true but lm_head.weight differs from embed_tokens.weight" in message


def test_every_unfitting_tensor_is_named_in_one_error(tmp_path):
    tensors = hub_tensors(LLAMA)
    del tensors["lm_head.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    tensors |= {"model.layers.3.mlp.up_proj.weight": np.zeros((96, 32), np.float32), "score": np.zeros(2, np.float32)}
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    message = refusal(write_hub(tmp_path / "hub", LLAMA, tensors))
    for problem in (
        "missing lm_head.weight",
        "missing layers.2.mlp.up_proj.weight",
        "unexpected layers.3.mlp.up_proj.weight",
        "unexpected score",
        "final_norm.scale has shape [31] instead of [32]",
    ):
        assert problem in message


def test_a_checkpoint_of_another_size_names_every_tensor_in_a_short_error(tmp_path):
    hub = write_hub(tmp_path / "hub", replace(LLAMA, hidden_size=64, head_size=16), hub_tensors(LLAMA))
    message = refusal(hub)
    assert "token_embedding has shape [101, 32] instead of [101, 64]" in message
    assert "layers.0|1|2.mlp.up.weight has shape [96, 32] instead of [96, 64]" in message
    assert len(message) < 2000


def test_a_tensor_stored_under_both_names_is_refused(tmp_path):
    tensors = hub_tensors(OPT)
    name = "decoder.embed_positions.weight"
    message = refusal(write_hub(tmp_path / "hub", OPT, tensors | {name: tensors[f"model.{name}"]}))
    assert f"model.{name} is stored with and without" in message


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param(lambda file: 0, id="nothing"),
        pytest.param(lambda file: 5, id="part of the length"),
        pytest.param(lambda file: 8, id="the length"),
        pytest.param(lambda file: 100, id="part of the header"),
        pytest.param(header_bytes, id="the header"),
        pytest.param(lambda file: file.stat().st_size // 2, id="half the data"),
        pytest.param(lambda file: file.stat().st_size - 1, id="all but a byte"),
    ],
)
def test_truncated_safetensors(hub, kept):
    file = hub / "model.safetensors"
    file.write_bytes(file.read_bytes()[: kept(file)])
    message = refusal(hub)
    assert str(file) in message
    assert "not a readable safetensors file" in message


@pytest.mark.parametrize(
    ("position", "damage"),
    [
        pytest.param(0, b"\xff" * 8, id="endless header"),
        pytest.param(0, b"\0" * 8, id="no header"),
        pytest.param(8, b"PK\x03\x04", id="no JSON"),
        pytest.param(12, b"\xff\xfe", id="no UTF-8"),
        pytest.param(8, b"[" * 64, id="nested"),
    ],
)
def test_corrupt_safetensors_header(hub, position, damage):
    file = hub / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[position : position + len(damage)] = damage
    file.write_bytes(content)
    assert f"{file}: not a readable safetensors file" in refusal(hub)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", [FLOAT32, BFLOAT16], ids=str)
def test_nan_and_infinity_are_refused(tmp_path, stored, value):
    tensors = {name: array.astype(stored) for name, array in hub_tensors(OPT).items()}
    tensors["model.decoder.layers.1.fc1.weight"][95, 31] = value
    message = refusal(write_hub(tmp_path / "hub", OPT, tensors))
    assert "layers.1.mlp.up.weight holds NaN or infinity" in message


def test_values_beyond_float16(tmp_path):
    tensors = {name: array.copy() for name, array in hub_tensors(OPT).items()}
    tensors["model.decoder.layers.2.fc2.bias"][:] = np.float16(65504.0)
    assert ci.load(write_hub(tmp_path / "hub", OPT, tensors), "float16")[0].layers[2].mlp.down.bias[0] == 65504
    tensors["model.decoder.layers.2.fc2.bias"][7] = 1e5
    message = refusal(write_hub(tmp_path / "hub", OPT, tensors), "float16")
    assert "layers.2.mlp.down.bias exceeds the range of float16; choose bfloat16 or float32" in message


def test_quantised_tensors_are_refused(tmp_path):
    tensors = hub_tensors(OPT)
    tensors["model.decoder.layers.0.fc1.weight"] = np.zeros((96, 32), np.int8)
    assert "model.decoder.layers.0.fc1.weight is I8" in refusal(write_hub(tmp_path / "hub", OPT, tensors))


def test_shards_an_index_names_must_be_there(tmp_path):
    hub = write_hub(tmp_path / "hub", OPT, hub_tensors(OPT), shards=3, index=True)
    (hub / "model-00002-of-00003.safetensors").unlink()
    message = refusal(hub)
    assert "missing model-00002-of-00003.safetensors" in message
    assert "model.safetensors.index.json" in message


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["model.safetensors"]}], ids=repr)
def test_an_index_must_map(tmp_path, index):
    hub = write_hub(tmp_path / "hub", OPT, hub_tensors(OPT), shards=3)
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json: has no weight_map" in refusal(hub)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        pytest.param(shutil.rmtree, "no such directory", id="no directory"),
        pytest.param(
            lambda hub: (hub / "config.json").unlink(), "neither coreinfer.json nor config.json", id="no config"
        ),
        pytest.param(lambda hub: (hub / "model.safetensors").unlink(), "no weights; expected", id="no weights"),
        pytest.param(lambda hub: [file.unlink() for file in hub.iterdir()], "no checkpoint", id="empty"),
        pytest.param(lambda hub: shutil.rmtree(hub) or hub.write_text("x"), "no such directory", id="a file"),
    ],
)
def test_directories_that_hold_no_checkpoint(hub, spoil, expected):
    spoil(hub)
    message = refusal(hub)
    assert message.startswith(f"{hub}: ")
    assert expected in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"model_type": "opt"', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "holds a JSON list, not an object"),
    ],
    ids=["cut", "empty", "no UTF-8", "nested", "a list"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_json_that_cannot_be_read(tmp_path, name, content, expected):
    hub = write_hub(tmp_path / "hub", OPT, hub_tensors(OPT), shards=3, index=True)
    (hub / name).write_bytes(content)
    message = refusal(hub)
    assert message.startswith(f"{hub / name}: ")
    assert expected in message


def test_another_family(hub):
    (hub / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 32}))
    assert f"{hub / 'config.json'}: model_type 'gpt2' is not implemented" in refusal(hub)


@pytest.mark.parametrize(
    "occupy",
    [
        pytest.param(lambda path: path.write_text("mine"), id="file"),
        pytest.param(lambda path: (path.mkdir(), (path / "kept").write_text("mine")), id="directory"),
        pytest.param(lambda path: path.symlink_to("nowhere"), id="dangling link"),
    ],
)
def test_an_existing_destination_is_left_alone(tmp_path, hub, occupy):
    occupy(tmp_path / "taken")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ci.CoreInferError, match="taken: exists already"):
        ci.convert(hub, tmp_path / "taken")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_destinations_parent_must_exist(tmp_path, hub):
    with pytest.raises(ci.CoreInferError, match="absent: no such directory; create it first"):
        ci.convert(hub, tmp_path / "absent" / "native")


@pytest.fixture
def converted(monkeypatch, tmp_path: Path) -> Path:
    """A native checkpoint in several shards."""
    monkeypatch.setattr(native, "SHARD_BYTES", 20_000)
    return ci.convert(write_hub(tmp_path / "hub", OPT, hub_tensors(OPT)), tmp_path / "converted")


def test_native_shards_stay_within_their_size(converted):
    shards = [load_file(file) for file in sorted(converted.glob("weights-*.safetensors"))]
    assert len(shards) > 3
    assert all(sum(array.nbytes for array in shard.values()) <= 20_000 for shard in shards if len(shard) > 1)
    assert_leaves(ci.load(converted, "float32")[0], weights(OPT))


def test_a_native_directory_is_not_converted_again(tmp_path, converted):
    with pytest.raises(ci.CoreInferError, match="converted already"):
        ci.convert(converted, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_missing_native_shard(converted):
    lost = sorted(converted.glob("weights-*.safetensors"))[1]
    names = load_file(lost)
    lost.unlink()
    with pytest.raises(ci.CoreInferError) as caught:
        ci.load(converted)
    assert all(f"missing {name}" in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 2}, "version 2; this release reads version 1"),
        ({"format": "other"}, "format 'other'"),
        ({"config": None}, "its config is not a model's"),
        ({"config": [1, 2]}, "its config is not a model's"),
        ({"config": {"family": "opt", "rope": None, "eos_ids": []}}, "its config is not a model's"),
    ],
)
def test_manifests_that_cannot_be_used(converted, change, expected):
    manifest = converted / "coreinfer.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(ci.CoreInferError, match=expected) as caught:
        ci.load(converted)
    assert str(caught.value).startswith(str(manifest))


@pytest.mark.parametrize(
    "odd", ["", "relu6", -1, 0, 2**63, 10**400, 0.5, [], {}, [[]], None], ids=lambda odd: str(odd)[:9]
)
def test_a_manifest_with_an_odd_value_loads_or_is_refused_in_one_line(tmp_path, odd):
    native.write_native(tmp_path, LLAMA, FLOAT32, iter(named_leaves(random_model(LLAMA))))
    manifest, refused = json.loads((tmp_path / "coreinfer.json").read_text()), {}
    for name in manifest["config"]:
        changed = manifest | {"config": manifest["config"] | {name: odd}}
        (tmp_path / "coreinfer.json").write_text(json.dumps(changed))
        try:
            ci.load(tmp_path)
        except ci.CoreInferError as error:
            refused[name] = str(error)
    assert {"family", "vocab_size", "activation"} <= set(refused)
    assert not any("\n" in message for message in refused.values())


def test_the_manifest_is_that_of_every_release(tmp_path):
    """Field for field what the first release wrote, so that either reads what the other converted."""
    rope = replace(LLAMA.rope, theta=5e5, scaling="llama3", factor=8.0, original_max_positions=64)
    config = replace(LLAMA, rope=rope, eos_ids=(2, 3))
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(random_model(config))}
    native.write_native(tmp_path, config, FLOAT32, iter(leaves.items()))
    sizes = {"vocab_size": 101, "hidden_size": 32, "embed_size": 32, "mlp_size": 96, "num_layers": 3}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_size": 8, "max_positions": 160}
    kinds = {"activation": "silu", "norm_eps": 1e-6, "norm_first": True, "final_norm": True}
    switches = {"attention_bias": False, "mlp_bias": False, "tied": False}
    scaling = {"scaling": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    positions = {"rope": {"theta": 5e5, **scaling, "original_max_positions": 64}}
    ids = {"bos_id": 1, "eos_ids": [2, 3], "pad_id": None}
    written = {"family": "llama", **sizes, **heads, **kinds, **switches, **positions, **ids}
    manifest = {"format": "coreinfer_jax", "version": 1, "dtype": "float32", "config": written}
    assert (tmp_path / "coreinfer.json").read_text() == json.dumps(manifest, indent=2) + "\n"
    assert ci.load(tmp_path)[0].config == config


def assert_only_the_source_is_left(tmp_path: Path) -> None:
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_a_disk_without_room_is_noticed_before_writing(tmp_path, hub, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ci.CoreInferError, match=r"needs .* GB but the disk has 0\.00 GB free"):
        ci.convert(hub, tmp_path / "native")
    assert_only_the_source_is_left(tmp_path)


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ci.CoreInferError),
        (native.SafetensorError("I/O error: No space left on device"), ci.CoreInferError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=repr,
)
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, hub, monkeypatch, failure, raised):
    written = []

    def fail_at_the_second(shard: Tensors, file: Path) -> None:
        written.append(file)
        save_file(shard, file)
        if len(written) == 2:
            raise failure

    monkeypatch.setattr(native, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(native, "save_file", fail_at_the_second)
    with pytest.raises(raised) as caught:
        ci.convert(hub, tmp_path / "native")
    assert raised is KeyboardInterrupt or "No space left on device" in str(caught.value)
    assert len(written) == 2
    assert_only_the_source_is_left(tmp_path)


def test_a_write_that_really_fails(tmp_path, hub):
    """The command line in a process that may write no file as large as the weights."""
    limited = (
        "import resource, sys; from coreinfer_jax.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, "convert", str(hub), str(tmp_path / "native")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"coreinfer: error: {tmp_path / 'native'}: ")
    assert done.stderr.count("\n") == 1
    assert_only_the_source_is_left(tmp_path)


def test_bin_without_torch_names_the_remedy(tmp_path, monkeypatch):
    save = lambda tensors, file: file.write_bytes(b"whatever")  # noqa: E731
    hub = write_hub(tmp_path / "hub", OPT, hub_tensors(OPT), save=save, stem="pytorch_model", suffix="bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'coreinfer_jax[torch]', or use a safetensors checkpoint" in refusal(hub)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("facebook/opt-125m", True),
        ("meta-llama/Llama-3.1-8B", True),
        ("here/model", False),
        ("gone/model", True),
        ("opt-125m", False),
        ("/facebook/opt-125m", False),
        ("./facebook/opt-125m", False),
        ("../opt-125m", False),
        ("a/b/c", False),
        ("facebook/", False),
        ("https://huggingface.co/facebook/opt-125m", False),
        ("C:\\models\\opt", False),
    ],
)
def test_what_looks_like_a_hub_id(tmp_path, monkeypatch, source, expected):
    (tmp_path / "here" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert looks_like_hub_id(source) == expected


TEXTS = ["config.json", "generation_config.json", "merges.txt", "vocab.json"]
NOISE = ["README.md", ".gitattributes", "flax_model.msgpack", "tf_model.h5", "rust_model.ot", "training_args.bin"]
SAFETENSORS = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)] + ["model.safetensors.index.json"]
BINS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize(
    ("available", "weights"),
    [
        ([*SAFETENSORS, *BINS, "original/consolidated.00.pth"], SAFETENSORS),
        (["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"], ["model.safetensors"]),
        (BINS, BINS),
        (["pytorch_model.bin", "model.safetensors.index.json"], ["pytorch_model.bin"]),
    ],
    ids=["both", "both whole", "bin", "an index alone"],
)
def test_only_needed_files_are_fetched(available, weights):
    assert needed_files([*TEXTS, *NOISE, *available]) == sorted([*TEXTS, *weights])


def listing(files: list[str]) -> SimpleNamespace:
    """What the hub's client says of a repository with these files."""
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])


def test_a_repository_without_weights():
    with pytest.raises(ci.CoreInferError, match="neither safetensors nor PyTorch"):
        needed_files([*TEXTS, *NOISE])


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (OSError("no route\nto host"), r"no-such-org/no-such-model: no such directory here, .* \(no route\)"),
        (["README.md"], "no-such-org/no-such-model: the repository holds neither"),
    ],
    ids=["unreachable", "no weights"],
)
def test_hub_failures_are_one_clear_error(tmp_path, monkeypatch, files, expected):
    def info(api: object, repository: str) -> SimpleNamespace:
        if isinstance(files, Exception):
            raise files
        return listing(files)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    with pytest.raises(ci.CoreInferError, match=expected) as caught:
        ci.convert("no-such-org/no-such-model", tmp_path / "native")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_fetched_repository_is_converted(tmp_path, hub, monkeypatch):
    files = ["config.json", "model.safetensors"]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, name: listing(files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(hub))
    assert_leaves(ci.load(ci.convert("some/opt", tmp_path / "native"), "float32")[0], weights(OPT))


def test_bin_weights_are_not_fetched_without_torch(tmp_path, monkeypatch):
    files = ["config.json", "pytorch_model.bin"]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, name: listing(files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: pytest.fail("downloaded"))
    monkeypatch.setattr("coreinfer_jax.io.hub.find_spec", lambda name: None)
    with pytest.raises(ci.CoreInferError, match="pip install"):
        ci.convert("some/opt-in-bin", tmp_path / "native")
