"""Tokenizers against the libraries they come from: ids, which files are read, what goes wrong with them."""

import io
import json
import logging
import shutil
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

import coreinfer_jax as ci
from coreinfer_jax.text import TOKENIZER_FILES, load_tokenizer, sentencepiece_cost, with_transformers

# How sentencepiece writes a space: it decodes to one.
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

TEXTS = [
    "Hello world",
    " leading space",
    "  two leading",
    "two  spaces   three",
    "trailing  ",
    " ",
    "   ",
    "\n",
    "\n\n leading lines",
    "line\nbreak\n\nand\ttab\t",
    "carriage\r\nreturn",
    "Ünïcödé, 日本語のテキスト。",
    "한국어 العربية עברית ไทย",
    "🙂👩‍👩‍👧 e\u0301 क्षि",
    "zero\u200bwidth\ufeff no\xa0break",
    "control \x00\x01\x1b\x7f\x85 characters",
    "\N{REPLACEMENT CHARACTER} and \N{LOWER ONE EIGHTH BLOCK}",
    "<s></s>",
    "before <s> between </s> after <unk> <pad>",
    "<|start_story|>Once<|end_story|> upon",
    "<0x0A> [INST] <<SYS>>",
    "42 + 1.5e-3 = ?",
    "龘𓂀𓃠" * 5,
    "a" * 300,
]


@pytest.fixture(scope="module")
def llama2(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only a tokenizer.model."""
    directory = tmp_path_factory.mktemp("llama2")
    shutil.copyfile(data / "tokenizers" / "llama2.model", directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="module")
def chatml(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 2's model and transformers' conversion of it, with tokens added as ChatML fine-tunes do."""
    directory = tmp_path_factory.mktemp("chatml")
    tokenizer = transformers.LlamaTokenizer.from_pretrained(llama2)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(directory)
    shutil.copyfile(llama2 / "tokenizer.model", directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="module")
def llama3(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer.json beside a file in tiktoken's format that is called tokenizer.model."""
    directory = tmp_path_factory.mktemp("llama3")
    source = data / "tokenizers" / "opt"
    vocabulary = json.loads((source / "vocab.json").read_text())
    merges = [tuple(line.split(" ")) for line in (source / "merges.txt").read_text().splitlines()[1:] if line]
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    ranks = "".join(f"{b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    (directory / "tokenizer.model").write_text(ranks)
    return directory


def sentencepiece_of(directory: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))


def copy(source: Path, target: Path, **configs: object) -> Path:
    """`source` copied to `target`, with a JSON file per keyword."""
    shutil.copytree(source, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
    target.chmod(0o755)
    for name, content in configs.items():
        (target / f"{name}.json").unlink(missing_ok=True)
        (target / f"{name}.json").write_text(json.dumps(content))
    return target


def test_opt_ids_equal_the_tokenizers_library(data):
    """Byte-level BPE of the published files, put together here; what looks like a special token is left to others."""
    source = data / "tokenizers" / "opt"
    backend = Backend(models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = load_tokenizer(source)
    for text in (text for text in TEXTS if "<" not in text):
        assert tokenizer.encode(text) == [2, *backend.encode(text).ids], text


def test_sentencepiece_ids(llama2):
    reference, tokenizer = sentencepiece_of(llama2), load_tokenizer(llama2)
    for text in ["", *TEXTS]:
        ids = tokenizer.encode(text)
        assert ids == [1, *reference.encode(text)], text
        assert tokenizer.decode(ids) == text.replace(SPACE, " ")


@pytest.mark.parametrize("name", ["opt", "tinystories"])
def test_transformers_ids(data, tinystories, name):
    directory = {"opt": data / "tokenizers" / "opt", "tinystories": tinystories}[name]
    reference, tokenizer = transformers.AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    for text in ["", *TEXTS]:
        ids = tokenizer.encode(text)
        assert ids == reference(text)["input_ids"], text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), text


# From the docstrings of transformers' tokenizers; OPT's BPE is RoBERTa's with another BOS.
@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("opt", "Hello world", [2, 31414, 232]),
        ("opt", " Hello world", [2, 20920, 232]),
        ("llama2", "Hello this is a test", [1, 15043, 445, 338, 263, 1243]),
    ],
)
def test_published_ids(real_data, llama2, name, text, ids):
    tokenizer = load_tokenizer({"opt": real_data / "tokenizers" / "opt", "llama2": llama2}[name])
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_a_release_of_transformers_that_loses_spaces_is_named(tinystories, monkeypatch):
    """As one that builds a byte-level tokenizer anew, with sentencepiece's sections in the place of its own."""
    opened = with_transformers._open

    def rebuilt(directory: Path) -> object:
        tokenizer = opened(directory)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
        return tokenizer

    assert load_tokenizer(tinystories) is not None
    monkeypatch.setattr(with_transformers, "_open", rebuilt)
    with pytest.raises(ci.CoreInferError, match=r"transformers \d.* loses the spaces of texts"):
        load_tokenizer(tinystories)


def test_a_model_config_beside_a_tokenizer_changes_no_ids(data, tmp_path):
    alone = load_tokenizer(data / "tokenizers" / "opt")
    beside = load_tokenizer(copy(data / "tokenizers" / "opt", tmp_path, config={"model_type": "opt"}))
    assert [beside.encode(text) for text in TEXTS] == [alone.encode(text) for text in TEXTS]


def test_a_long_text_is_encoded_silently(data, caplog):
    ids = load_tokenizer(data / "tokenizers" / "opt").encode("the " * 3000)  # more than OPT's 2048 positions
    assert len(ids) == 3002
    assert not caplog.records


def test_sentencepiece_counts_where_tokenizer_json_is_its_conversion(chatml):
    reference, tokenizer = sentencepiece_of(chatml), load_tokenizer(chatml)
    for text in TEXTS:
        if "<" not in text:
            assert tokenizer.encode(text) == [1, *reference.encode(text)], text
    rebuilt = transformers.AutoTokenizer.from_pretrained(chatml)
    assert rebuilt(" leading space")["input_ids"] != tokenizer.encode(" leading space")  # else the rule is not needed


def test_added_tokens_are_tokens_within_a_text(chatml):
    reference, tokenizer = sentencepiece_of(chatml), load_tokenizer(chatml)
    ids = tokenizer.encode("<|im_start|>user\nCall <tool>!</s><|im_end|>")
    # The conversion says that only the first part of a text gets a space in front: no "▁user".
    inner = [reference.piece_to_id(piece) for piece in ("user", "<0x0A>", "Call", "▁")]
    start, end, tool = range(len(reference), len(reference) + 3)
    assert ids == [1, start, *inner, tool, reference.piece_to_id("!"), 2, end]
    assert tokenizer.decode(ids) == "user\nCall <tool>!"


def test_a_conversion_that_prefixes_every_part_does(chatml, tmp_path):
    reference = sentencepiece_of(chatml)
    pipeline = json.loads((chatml / "tokenizer.json").read_text())
    pipeline["normalizer"] = {"type": "Prepend", "prepend": "▁"}
    pipeline["pre_tokenizer"] = None
    tokenizer = load_tokenizer(copy(chatml, tmp_path, tokenizer=pipeline))
    ids = tokenizer.encode("Call<tool>it<|im_end|>")
    end, tool = len(reference) + 1, len(reference) + 2
    assert ids == [1, *reference.encode("Call"), tool, *reference.encode("it"), end]
    assert tokenizer.decode(ids) == "Call<tool>it"


def added_behind(pieces: int) -> dict[str, object]:
    """A tokenizer_config.json that adds two tokens to a model of so many pieces."""
    start, tool = {"content": "<|im_start|>", "special": True}, {"content": "<tool>", "rstrip": True}
    return {"added_tokens_decoder": {str(pieces): start, str(pieces + 1): tool}}


@pytest.mark.parametrize("where", ["added_tokens_decoder", "added_tokens.json"])
def test_added_tokens_beside_a_bare_model(llama2, tmp_path, where):
    reference = sentencepiece_of(llama2)
    start, tool = len(reference), len(reference) + 1
    configs = {
        "added_tokens_decoder": {"tokenizer_config": added_behind(len(reference))},
        "added_tokens.json": {
            "added_tokens": {"<|im_start|>": start, "<tool>": tool},
            "special_tokens_map": {"additional_special_tokens": ["<|im_start|>"]},
        },
    }
    tokenizer = load_tokenizer(copy(llama2, tmp_path, **configs[where]))
    ids = tokenizer.encode("one<|im_start|>two<tool>three")
    assert ids == [1, *reference.encode("one"), start, *reference.encode("two"), tool, *reference.encode("three")]
    assert tokenizer.decode(ids) == "one two<tool>three"  # as transformers and sentencepiece leave out special tokens
    assert tokenizer.encode("<s>") == [1, *reference.encode("<s>")]  # declared by no file: text, as to sentencepiece


NAMED = {
    "a name": {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}},
    "objects": {"special_tokens_map": {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<s>"}},
    "without a name": {"tokenizer_config": {"additional_special_tokens": ["</s>", {"content": "<s>"}]}},
}


@pytest.mark.parametrize("where", NAMED)
def test_what_files_call_a_special_token_is_one_in_prompts(llama2, tmp_path, where):
    reference = sentencepiece_of(llama2)
    tokenizer = load_tokenizer(copy(llama2, tmp_path, **NAMED[where]))
    ids = tokenizer.encode("a</s>b<s>c")
    assert ids == [1, *reference.encode("a"), 2, *reference.encode("b"), 1, *reference.encode("c")]
    assert tokenizer.decode(ids) == "a b c"


def test_special_tokens_in_prompts_are_those_of_transformers(llama2, tmp_path):
    copy(llama2, tmp_path, tokenizer_config=NAMED["a name"]["tokenizer_config"] | {"tokenizer_class": "LlamaTokenizer"})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("a</s>b<s>c<unk>d")["input_ids"]
    ours = load_tokenizer(tmp_path).encode("a</s>b<s>c<unk>d")
    assert [i for i in ours if i < 3] == [1, 2, 1, 0]
    assert [i for i in theirs if i < 3][-3:] == [2, 1, 0]  # some releases put a BOS in front


@pytest.mark.parametrize("name", ["\ud800", "<\udfff>", "a" * 100_000, ""])
def test_a_special_token_that_is_no_text_is_none(llama2, tmp_path, name):
    config = {"pad_token": name, "additional_special_tokens": [name, 5, None, {"content": name}]}
    tokenizer = load_tokenizer(copy(llama2, tmp_path, tokenizer_config=config))
    assert tokenizer.encode("a</s>b") == [1, *sentencepiece_of(llama2).encode("a</s>b")]


def test_a_special_token_that_the_vocabulary_lacks_stays_text(llama2, tmp_path):
    tokenizer = load_tokenizer(copy(llama2, tmp_path, tokenizer_config={"pad_token": "<pad>", "eos_token": "</s>"}))
    assert tokenizer.encode("a<pad>b") == [1, *sentencepiece_of(llama2).encode("a<pad>b")]


def test_white_space_beside_an_added_token_may_belong_to_it(llama2, tmp_path):
    reference = sentencepiece_of(llama2)
    tokenizer = load_tokenizer(copy(llama2, tmp_path, tokenizer_config=added_behind(len(reference))))
    tool = len(reference) + 1
    assert tokenizer.encode("a <tool>\n b") == [1, *reference.encode("a "), tool, *reference.encode("b")]


def test_the_longest_added_token_counts(llama2, tmp_path):
    a, ab = len(sentencepiece_of(llama2)), len(sentencepiece_of(llama2)) + 1
    tokenizer = load_tokenizer(copy(llama2, tmp_path, added_tokens={"<a>": a, "<a><b>": ab}))
    assert tokenizer.encode("<a><b><a>") == [1, ab, a]


@pytest.mark.parametrize(
    ("config", "start"),
    [
        ({"add_bos_token": False}, []),
        ({"add_bos_token": True}, [1]),
        ({"bos_token": "</s>"}, [2]),
        ({"bos_token": {"content": "</s>"}}, [2]),
    ],
    ids=str,
)
def test_the_beginning_of_a_sequence(llama2, tmp_path, config, start):
    tokenizer = load_tokenizer(copy(llama2, tmp_path, tokenizer_config=config))
    assert tokenizer.encode("Hello") == [*start, *sentencepiece_of(llama2).encode("Hello")]


def test_an_added_token_begins_a_sequence(llama2, tmp_path):
    reference = sentencepiece_of(llama2)
    config = added_behind(len(reference)) | {"bos_token": "<|im_start|>"}
    tokenizer = load_tokenizer(copy(llama2, tmp_path, tokenizer_config=config))
    assert tokenizer.encode("Hello") == [len(reference), *reference.encode("Hello")]


def test_a_model_without_a_space_in_front(llama2, tmp_path):
    tokenizer = load_tokenizer(copy(llama2, tmp_path, tokenizer_config={"add_prefix_space": False}))
    reference = sentencepiece_of(llama2)
    assert tokenizer.encode("Hello world") == [1, reference.piece_to_id("Hello"), reference.piece_to_id("▁world")]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace(SPACE, " ")


def test_an_unrelated_tokenizer_model_is_not_read(llama3, llama2, tmp_path):
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(llama3 / "tokenizer.json"))
    expected = [reference(text)["input_ids"] for text in TEXTS]
    tiktoken = load_tokenizer(llama3)
    assert [tiktoken.encode(text) for text in TEXTS] == expected
    other = copy(llama3, tmp_path)
    shutil.copyfile(llama2 / "tokenizer.model", other / "tokenizer.model")  # sentencepiece's, but another vocabulary
    tokenizer = load_tokenizer(other)
    assert [tokenizer.encode(text) for text in TEXTS] == expected


def test_a_sentencepiece_model_of_another_vocabulary_is_not_read(tinystories, llama2, tmp_path):
    both = copy(tinystories, tmp_path)
    shutil.copyfile(llama2 / "tokenizer.model", both / "tokenizer.model")
    text = "Once upon a time"
    assert load_tokenizer(both).encode(text) == load_tokenizer(tinystories).encode(text)


@pytest.mark.parametrize("name", ["tinystories", "opt", "llama2", "chatml", "llama3"])
def test_converting_keeps_the_tokenizer(request, data, tinystories, tmp_path, name):
    directory = tinystories if name == "tinystories" else data / "tokenizers" / "opt"
    directory = directory if name in ("tinystories", "opt") else request.getfixturevalue(name)
    source = copy(directory, tmp_path / "source")
    (source / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}")
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(tinystories / file, source / file)
    before = load_tokenizer(source)
    ids = [before.encode(text) for text in TEXTS]
    chat = before.encode_chat([{"role": "user", "content": "hi <tool>"}])
    converted = ci.convert(source, tmp_path / "converted")
    shutil.rmtree(source)
    after = load_tokenizer(converted)
    assert [after.encode(text) for text in TEXTS] == ids
    assert after.encode_chat([{"role": "user", "content": "hi <tool>"}]) == chat


@pytest.mark.parametrize("names", [[], ["tokenizer_config.json"], ["vocab.json"], ["README.md"]], ids=str)
def test_directories_without_a_tokenizer(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("{}")
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100, b"\xff\xfe" * 50], ids=["empty", "{}", "zeros", "noise"])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_corrupt_tokenizers(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, name)


def refused(directory: Path, name: str) -> None:
    """Loading fails in one line that names the file and the remedy."""
    with pytest.raises(ci.CoreInferError) as caught:
        load_tokenizer(directory)
    message = str(caught.value)
    assert message.startswith(f"{directory / name}: ")
    assert message.endswith("download it again")
    assert message.count(str(directory)) == 1
    assert "\n" not in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"\xff\xfe", b"[" * 100_000], ids=lambda content: str(content[:4])
)
@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("llama2", "tokenizer_config.json"),
        ("llama2", "special_tokens_map.json"),
        ("llama2", "added_tokens.json"),
        ("chatml", "tokenizer.json"),
        ("chatml", "tokenizer.model"),
        ("llama3", "tokenizer.json"),
        ("llama3", "tokenizer_config.json"),
    ],
)
def test_one_broken_file_among_others(request, tmp_path, source, name, content):
    directory = copy(request.getfixturevalue(source), tmp_path)
    (directory / name).unlink(missing_ok=True)
    (directory / name).write_bytes(content)
    refused(directory, name)


@pytest.mark.parametrize("source", ["llama2", "llama3"])
def test_a_chat_template_that_is_no_text(request, tmp_path, source):
    directory = copy(request.getfixturevalue(source), tmp_path)
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
    refused(directory, "chat_template.jinja")


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"x": {"content": "<a>"}}},
        {"added_tokens_decoder": {"-1": {"content": "<a>"}}},
        {"added_tokens_decoder": {"32000": {"content": 3}}},
        {"added_tokens_decoder": {"32000": "<a>"}},
        {"added_tokens_decoder": {"32000": {}}},
        {"added_tokens_decoder": 3},
    ],
    ids=str,
)
def test_malformed_added_tokens(llama2, tmp_path, config):
    refused(copy(llama2, tmp_path, tokenizer_config=config), "tokenizer_config.json")


@pytest.mark.parametrize("source", ["llama2", "tinystories"])
def test_truncated_tokenizers(tmp_path, llama2, tinystories, source):
    file = {"llama2": llama2 / "tokenizer.model", "tinystories": tinystories / "tokenizer.json"}[source]
    (tmp_path / file.name).write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused(tmp_path, file.name)


def test_a_sentencepiece_model_with_a_piece_that_is_no_text(llama2, tmp_path):
    piece = "\N{LOWER ONE EIGHTH BLOCK}Hello".encode()
    whole = (llama2 / "tokenizer.model").read_bytes()
    assert whole.count(piece + b"\x15") == 1  # the piece, its score next
    (tmp_path / "tokenizer.model").write_bytes(whole.replace(piece + b"\x15", b"\xff" + piece[1:] + b"\x15"))
    refused(tmp_path, "tokenizer.model")


def test_a_sentencepiece_model_that_makes_texts_much_longer(llama2, tmp_path):
    """Its table of replacements holds a long one; NFKC's own longest, 33 bytes, is no reason."""
    trained = io.BytesIO()
    words = [f"{letter}{letter} ab" for letter in "abcdefgh"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=trained, vocab_size=14, minloglevel=2
    )
    whole = trained.getvalue()
    (tmp_path / "tokenizer.model").write_bytes(whole)
    load_tokenizer(tmp_path)
    table = (4).to_bytes(4, "little") + bytes(4) + b"short\0" + b"x" * 300 + b"\0"
    settings = b"\x12" + bytes([len(table) & 127 | 128, len(table) >> 7]) + table
    (tmp_path / "tokenizer.model").write_bytes(whole + b"\x1a" + bytes([len(settings) & 127 | 128, 2]) + settings)
    refused(tmp_path, "tokenizer.model")
    with pytest.raises(ci.CoreInferError, match="replaces characters by up to 300 bytes, more than 256"):
        load_tokenizer(tmp_path)
    assert max(map(len, sentencepiece_cost._replacements(whole))) == 33
    assert max(map(len, sentencepiece_cost._replacements((llama2 / "tokenizer.model").read_bytes()))) == 0


def test_a_reason_that_quotes_the_file_is_cut_short(tinystories, tmp_path):
    directory = copy(tinystories, tmp_path)
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "truncation": "a" * 100_000, "model": {}}))
    refused(directory, "tokenizer.json")


def test_code_that_comes_with_a_tokenizer_is_neither_run_nor_asked_about(llama3, tmp_path):
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    directory = copy(llama3, tmp_path, tokenizer_config=config)
    (directory / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ci.CoreInferError, match=r"tokenizer\.json: "):
        load_tokenizer(directory)


def test_ids_beyond_a_sentencepiece_model_decode_to_nothing(llama2):
    reference = sentencepiece_of(llama2)
    hello, world = reference.encode("Hello"), reference.encode("world")
    assert load_tokenizer(llama2).decode([1, *hello, len(reference), *world]) == "Hello world"


def test_loading_prints_nothing_without_pytorch_and_leaves_logging_as_it_was(data):
    """transformers advises to install PyTorch when it is imported, once per process: this takes a new one."""
    code = (
        "import sys, logging, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name.partition('.')[0] == 'torch' else find(name, *rest)\n"
        "from pathlib import Path\n"
        "from coreinfer_jax.text import load_tokenizer\n"
        "tokenizer = load_tokenizer(Path(sys.argv[1]))\n"
        "import transformers\n"
        "assert not transformers.is_torch_available()\n"
        "assert not logging.getLogger('transformers').filters\n"
        "print(tokenizer.encode('Hello world'))\n"
        "logging.getLogger('transformers').warning('heard')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(data / "tokenizers" / "opt")], capture_output=True, text=True, timeout=120
    )
    assert json.loads(ran.stdout) == load_tokenizer(data / "tokenizers" / "opt").encode("Hello world")
    assert ran.stderr.endswith("heard\n")
    assert ran.stderr.count("\n") == 1


def test_loading_restores_the_level_of_transformers_logger(data):
    logger = logging.getLogger("transformers")
    level = logger.level
    load_tokenizer(data / "tokenizers" / "opt")
    assert logger.level == level
    assert not logger.filters


def test_every_file_of_a_tokenizer_is_listed(chatml):
    assert {file.name for file in chatml.iterdir()} <= set(TOKENIZER_FILES)
