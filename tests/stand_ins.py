"""What stands for the data beside the project where there is none: made of the package's models and of texts below."""

import io
import json
import shutil
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import sentencepiece
from safetensors.numpy import load_file, save_file

import coreinfer_jax as ci
from coreinfer_jax.text import Tokenizer

ASSETS = Path(ci.__file__).parent / "assets"

# One tale; the words of a line in brackets, of which each tale draws one, are the same wherever the line is named.
TALE = """Once upon a time there was a {who} who lived {where} with a {friend}. They were poor, but they were never sad.
One morning the {who} found {thing} in the snow, and showed it to the {friend}.
"Look," said the {who}, "this is {thing}. Somebody must have lost it, and we should carry it home before the night."
The {friend} did not like the cold wind. "It is far," said the {friend}, "and the road is dark. What shall we eat?"
"We have bread and two apples," answered the {who}. So they walked over the hills and through the old forest.
Near a bridge they met {other}, who was hungry. The {who} gave away the bread, and the {friend} gave away an apple.
Then {other} told them which way to go, and said that {thing} belonged to the queen of the country beyond the river.
They came to her house when the stars were out. The queen was glad, for she had looked for {thing} in every room.
"You are honest," said the queen. "Stay with me this winter, and nobody who is hungry shall pass my door again."
The {who} and the {friend} thanked her. In spring they went back {where}, and they told this story to all who asked."""
WORDS = {
    "who": ["girl", "boy", "tailor", "miller", "shepherd", "sailor", "baker"],
    "where": ["by the sea", "in a village", "under a mountain", "near the mill", "at the end of a long road"],
    "friend": ["dog", "hare", "goose", "brother", "donkey", "cat"],
    "thing": ["a golden ring", "a silver key", "a small bell", "a red shoe", "a wooden box"],
    "other": ["an old woman", "a fox", "a soldier", "a blind man"],
}
# Words that tests want as pieces, with and without a space in front.
PIECES = ("Hello", "world", "user", "assistant", "Call", "it", "one", "two", "three", "this is a test", "INST")
# Groups, the longest list, and neurons of the lists published for two models.
PUBLISHED = {"opt-6.7B_QA": (5, 10000, 16384), "Llama3-8B_QA": (4, 11470, 14336)}

LAYERS, POSITIONS = 2, 512


def tale(number: int) -> str:
    drawn = Random(number)
    return TALE.format_map({name: drawn.choice(words) for name, words in WORDS.items()}).replace("\n", " ")


def write_data(directory: Path) -> Path:
    """Models, tokenizers, texts and lists of neurons under the names that the data has, as far as tests use them."""
    for name in ("models/tinystories-656k", "tokenizers/opt", "text", "neurons"):
        (directory / name).mkdir(parents=True)
    write_byte_level(directory / "tokenizers" / "opt")
    (directory / "tokenizers" / "llama2.model").write_bytes(sentencepiece_model())
    write_tied_llama(directory / "models" / "tinystories-656k")
    (directory / "text" / "tinystories_val.txt").write_text("\n\n".join(tale(i) for i in range(200)))
    articles = ("\n\n".join(tale(j) for j in range(3 * i, 3 * i + 3)) for i in range(20))
    (directory / "text" / "wiki.txt").write_text("\n<|endoftext|>\n".join(articles))
    for name, sizes in PUBLISHED.items():
        write_lists(directory / "neurons" / f"{name}.npz", *sizes)
    return directory


def write_byte_level(directory: Path) -> None:
    """The embedded OPT model's byte-level BPE, in the files that OPT's has."""
    pipeline = json.loads((ASSETS / "opt" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (directory / "vocab.json").write_text(json.dumps(pipeline["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in pipeline["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(special))
    described = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(described | special | {"model_max_length": 2048}))


def sentencepiece_model() -> bytes:
    """BPE with byte fallback and without normalisation, as Llama 2's, trained on tales and `PIECES`."""
    model = io.BytesIO()
    lines = [tale(i) for i in range(100)] + [f"({word}) {word}!" for word in PIECES] * 100
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=800,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_shallow(name: str, directory: Path) -> Path:
    """An embedded model's first two layers, 512 positions and tokenizer: the same code, and less to compile."""
    measured = shutil.ignore_patterns("loss.*", "training.json", "coreinfer-*")
    shutil.copytree(ASSETS / name, directory, ignore=measured, dirs_exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "max_position_embeddings": POSITIONS}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "model.safetensors")
    layer_of = {tensor: int(tensor.partition(".layers.")[2].partition(".")[0] or 0) for tensor in tensors}
    kept = {tensor: weight for tensor, weight in tensors.items() if layer_of[tensor] < LAYERS}
    if "model.decoder.embed_positions.weight" in kept:
        kept["model.decoder.embed_positions.weight"] = kept["model.decoder.embed_positions.weight"][: POSITIONS + 2]
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@cache
def shallow_model(name: str) -> tuple[ci.Params, Tokenizer]:
    """What `load` returns of such a model, in float32."""
    with TemporaryDirectory() as directory:
        params, tokenizer = ci.load(write_shallow(name, Path(directory)), "float32")
    assert tokenizer is not None
    return params, tokenizer


def write_tied_llama(directory: Path) -> None:
    """The embedded LLaMA cut down, as transformers writes some tied models: `lm_head.weight` alone is stored."""
    write_shallow("llama", directory)
    tensors = {name: tensor.astype(np.float32) for name, tensor in load_file(directory / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    alias = {"format": "pt", "model.embed_tokens.weight": "lm_head.weight"}
    save_file(tensors, directory / "model.safetensors", metadata=alias)
    (directory / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    write_pipeline(directory)


def write_pipeline(directory: Path) -> None:
    """The embedded LLaMA's sentencepiece model as a tokenizer.json of words alone, without pieces for bytes."""
    import transformers

    tags = ["<unk>", "<|start_story|>", "<|end_story|>"]
    transformers.LlamaTokenizer.from_pretrained(directory).save_pretrained(directory)
    (directory / "tokenizer.model").unlink()
    pipeline = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = {piece.replace("<0x", "<no byte "): i for piece, i in pipeline["model"]["vocab"].items()}
    pieces = {tags[i] if i < len(tags) else piece: i for piece, i in pieces.items()}
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": True}
    added = [{"id": i, "content": tag, **flags} for i, tag in enumerate(tags)]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    bos, text = {"SpecialToken": {"id": tags[1], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pipeline |= {
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text],
            "special_tokens": {tags[1]: {"id": tags[1], "ids": [1], "tokens": [tags[1]]}},
        },
        "model": pipeline["model"] | {"vocab": pieces},
    }
    (directory / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    names = dict(zip(("unk_token", "bos_token", "eos_token"), tags, strict=True)) | {"pad_token": "<unk>"}
    described = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False} | names
    described["added_tokens_decoder"] = {str(i): {"content": tag, **flags} for i, tag in enumerate(tags)}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    (directory / "special_tokens_map.json").write_text(json.dumps(names))


def write_lists(file: Path, groups: int, longest: int, neurons: int) -> None:
    """Lists as published: every group's holds, behind its own neurons, those of the groups before it."""
    drawn = np.random.default_rng(0)
    lists = {}
    for layer in range(32):
        order = drawn.permutation(neurons)
        for group in range(groups):
            kept = longest - 1500 * (groups - 1 - group)
            lists[f"L{layer}_C{group}"] = np.roll(order, 500 * group)[:kept].astype(np.int16)
    np.savez_compressed(file, **lists)
