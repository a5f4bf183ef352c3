"""Conversations by chat templates, against transformers and Meta's format for Llama 2."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import transformers

import coreinfer_jax as ci
from coreinfer_jax.text import end_of_turn, load_tokenizer

# Llama 2's, as in its tokenizer_config.json, without system messages.
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HI = [{"role": "user", "content": "hi"}]
TALK = [*HI, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": " Wie geht's?  🙂 "}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *HI]


@pytest.fixture
def llama2(data: Path, tmp_path: Path) -> Path:
    shutil.copyfile(data / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    return tmp_path


@pytest.fixture
def opt(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data / "tokenizers" / "opt", tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile)
    tmp_path.chmod(0o755)
    return tmp_path


def write_template(directory: Path, template: object, where: str, **config: object) -> None:
    if where == "chat_template.jinja":
        (directory / where).write_text(str(template))
    else:
        config["chat_template"] = template
    file = directory / "tokenizer_config.json"
    config = (json.loads(file.read_text()) if file.exists() else {}) | config
    file.unlink(missing_ok=True)
    file.write_text(json.dumps(config))


WHERE = pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])


@WHERE
def test_llama2_conversations(llama2, where):
    """Meta's code encodes turn by turn, each between BOS and EOS, and the last one without EOS."""
    write_template(llama2, LLAMA2, where)
    reference, tokenizer = sentencepiece.SentencePieceProcessor(str(llama2 / "tokenizer.model")), load_tokenizer(llama2)
    assert tokenizer.encode_chat(HI) == [1, *reference.encode("[INST] hi [/INST]")]
    turns = ["[INST] hi [/INST] Hello. ", "[INST] Wie geht's?  🙂 [/INST]"]
    assert tokenizer.encode_chat(TALK) == [1, *reference.encode(turns[0]), 2, 1, *reference.encode(turns[1])]


def test_the_published_ids_of_a_conversation(real_data, llama2):
    """As in many places for "<s>[INST] hi [/INST]"."""
    write_template(llama2, LLAMA2, "chat_template.jinja")
    assert load_tokenizer(llama2).encode_chat(HI) == [1, 518, 25580, 29962, 7251, 518, 29914, 25580, 29962]


def test_turns_begin_alike_in_every_version_of_transformers(llama2):
    """Its flag `legacy` is about text behind added tokens; behind a BOS a new sequence begins."""
    write_template(llama2, LLAMA2, "tokenizer_config.json", legacy=False, add_bos_token=True)
    reference = sentencepiece.SentencePieceProcessor(str(llama2 / "tokenizer.model"))
    assert load_tokenizer(llama2).encode_chat(HI) == [1, *reference.encode("[INST] hi [/INST]")]


@pytest.mark.parametrize("legacy", [True, False])
def test_chatml_on_a_sentencepiece_model(llama2, legacy):
    reference = sentencepiece.SentencePieceProcessor(str(llama2 / "tokenizer.model"))
    start, end = len(reference), len(reference) + 1
    (llama2 / "added_tokens.json").write_text(json.dumps({"<|im_start|>": start, "<|im_end|>": end}))
    write_template(llama2, CHATML, "chat_template.jinja", legacy=legacy)

    def part(text: str) -> list[int]:
        """`text` behind an added token: by sentencepiece, behind a line break where there is to be no space."""
        return reference.encode(text) if legacy else reference.encode("\n" + text)[2:]

    expected = [start, *part("user\nhi"), end, *part("\n"), start, *part("assistant\n")]
    assert load_tokenizer(llama2).encode_chat(HI) == expected


@WHERE
@pytest.mark.parametrize("template", [LLAMA2, CHATML], ids=["llama2", "chatml"])
@pytest.mark.parametrize("messages", [HI, TALK], ids=["one", "three"])
def test_transformers_conversations(opt, where, template, messages):
    write_template(opt, template, where)
    reference, tokenizer = transformers.AutoTokenizer.from_pretrained(opt), load_tokenizer(opt)
    ids = tokenizer.encode_chat(messages)
    assert ids == reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    # What the template writes and nothing else: no BOS in front of it.
    written = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert reference.decode(ids) == written
    assert [ids[0], ids[1] == 2] == [2 if template == LLAMA2 else ids[0], False]


@pytest.mark.parametrize("source", ["opt", "llama2"])
def test_the_default_counts_among_several_templates(request, source):
    directory = request.getfixturevalue(source)
    templates = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    write_template(directory, templates, "tokenizer_config.json")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.decode(tokenizer.encode_chat(HI)) == "one"
    write_template(directory, templates[1:], "tokenizer_config.json")
    assert "multiple chat templates with no default" in rejection(directory, HI)


@pytest.mark.parametrize("source", ["opt", "llama2"])
def test_no_template(request, source):
    message = rejection(request.getfixturevalue(source), HI)
    assert message == "has no chat template; give plain text, without --chat, or take a chat-tuned model"


def rejection(directory: Path, messages: list[dict[str, str]]) -> str:
    """What is said about a conversation that cannot be encoded, without the directory's name."""
    with pytest.raises(ci.CoreInferError) as caught:
        load_tokenizer(directory).encode_chat(messages)
    message = str(caught.value)
    assert message.startswith(f"{directory}: ")
    assert "\n" not in message
    return message.removeprefix(f"{directory}: ")


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (LLAMA2, SYSTEM, "Only user and assistant roles are supported!"),
        (LLAMA2, [], "empty conversation"),
        (LLAMA2, [{"role": "user"}], "content"),
        ("{% for %}", HI, "Expected"),
        ("{{ undefined.x.y }}", HI, "undefined"),
        ("{{ ''.__class__.__mro__ }}", HI, "unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", HI, "too big"),
    ],
    ids=["system", "empty", "content", "syntax", "undefined", "sandbox", "range"],
)
@pytest.mark.parametrize("source", ["opt", "llama2"])
def test_conversations_that_a_template_rejects(request, source, template, messages, reason):
    directory = request.getfixturevalue(source)
    write_template(directory, template, "chat_template.jinja")
    message = rejection(directory, messages)
    assert message.startswith("its chat template cannot be applied to this conversation (")
    assert message.endswith("; change the conversation, or take another model")
    assert reason in message


@pytest.mark.parametrize("template", [3, [3], [{"name": "default"}]], ids=str)
@pytest.mark.parametrize("source", ["opt", "llama2"])
def test_malformed_templates(request, source, template):
    directory = request.getfixturevalue(source)
    write_template(directory, template, "tokenizer_config.json")
    with pytest.raises(ci.CoreInferError, match=str(directory)):
        load_tokenizer(directory).encode_chat(HI)


@pytest.mark.parametrize("kind", ["opt", "llama2"])
def test_the_text_of_a_conversation(kind, request):
    directory = request.getfixturevalue(kind)
    write_template(directory, CHATML, "tokenizer_config.json")
    tokenizer = load_tokenizer(directory)
    said = "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.render_chat(HI, begin_answer=True) == f"{said}<|im_start|>assistant\n"
    begun = [*HI, {"role": "assistant", "content": "Well"}]
    assert tokenizer.render_chat(begun, begin_answer=False) == f"{said}<|im_start|>assistant\nWell"


def test_a_reply_ends_where_the_template_ends_it(llama2):
    """Whatever token that is, and whatever stands around it: as the ids of a longer conversation have it."""
    size = len(sentencepiece.SentencePieceProcessor(str(llama2 / "tokenizer.model")))
    added = {"<|im_start|>": size, "<|im_end|>": size + 1, "<|user|>": size + 2}
    declared = {str(i): {"content": text, "special": True} for text, i in added.items()}
    config = {"added_tokens_decoder": declared, "bos_token": "<s>", "eos_token": "</s>"}
    assert end_of_turn(load_tokenizer(llama2)) == ()
    write_template(llama2, LLAMA2, "tokenizer_config.json", **config)
    assert end_of_turn(load_tokenizer(llama2)) == (2,)
    write_template(llama2, CHATML, "tokenizer_config.json", **config)
    assert end_of_turn(load_tokenizer(llama2)) == (2, size + 1)
    header = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}\n{% endfor %}"
    write_template(llama2, header, "tokenizer_config.json", **config)
    assert end_of_turn(load_tokenizer(llama2)) == (2, size + 2)
    write_template(llama2, "{{ raise_exception('no') }}", "tokenizer_config.json", **config)
    assert end_of_turn(load_tokenizer(llama2)) == (2,)


def test_a_reply_ends_at_the_tokenizers_own_eos(opt):
    """As transformers names it."""
    write_template(opt, CHATML, "chat_template.jinja")
    assert end_of_turn(load_tokenizer(opt)) == (transformers.AutoTokenizer.from_pretrained(opt).eos_token_id,)
