"""`coreinfer chat` with a user who types ahead, on a small model without and with a chat template."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import coreinfer_jax as ci
from coreinfer_jax.cli import chat, main

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def typed(monkeypatch, capsys, shallow):
    """Runs `coreinfer chat` while a user types `lines`, then Ctrl-D: status, stdout, stderr."""

    def typed(lines: list[str], *options: str, model: Path = shallow["opt"]) -> tuple[int, str, str]:
        waiting: Iterator[str] = iter(lines)

        def answer(prompt: str = "") -> str:
            line = next(waiting, None)
            if line is None:
                raise EOFError
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr("builtins.input", answer)
        capsys.readouterr()
        status = main(["chat", "--model", str(model), "--beta", "0.5", "--max-new-tokens", "12", *options])
        return status, *capsys.readouterr()

    return typed


@pytest.fixture(scope="module")
def templated(shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a chat template."""
    directory = ci.convert(shallow["opt"], tmp_path_factory.mktemp("chat") / "model")
    described = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    (directory / "tokenizer_config.json").write_text(json.dumps(described | {"chat_template": TEMPLATE}))
    return directory


def reply_of(model: str | Path, text: str, core: ci.CoreConfig | None = ci.CoreConfig()) -> str:
    """What the model continues `text` with, from a fresh start."""
    params, tokenizer = ci.load(model)
    prompt = tokenizer.encode(text)
    tokens = ci.generate(params, [prompt], core, max_new_tokens=12, eos_ids=params.config.eos_ids).tokens[0]
    return tokenizer.decode([*prompt, *tokens.tolist()])[len(tokenizer.decode(prompt)) :]


def test_turns_see_the_whole_conversation(typed, templated):
    status, out, err = typed(["Hello there", "And then?"], "--temperature", "0", model=templated)
    first = reply_of(templated, "<user> Hello there\n<assistant>")
    second = reply_of(templated, f"<user> Hello there\n<assistant> {first}\n<user> And then?\n<assistant>")
    assert status == 0
    assert out == f"{first}\n{second}\n"
    assert err.count("MLP neurons") == 2
    assert " cached) + 12 new tokens" in err


def test_without_a_template_the_conversation_is_one_text(typed, shallow):
    _, out, err = typed(["Once upon a time", "The king"], "--temperature", "0")
    first = reply_of(shallow["opt"], "Once upon a time")
    assert out == f"{first}\n{reply_of(shallow['opt'], f'Once upon a time{first}' + chr(10) * 2 + 'The king')}\n"
    assert "no chat template" in err


def test_reset_forgets(typed, shallow):
    _, out, err = typed(["The king", "/reset", "The king"], "--temperature", "0")
    assert out == 2 * (reply_of(shallow["opt"], "The king") + "\n")
    assert "forgotten" in err


def test_exit_empty_lines_and_ctrl_c_at_the_prompt(typed):
    status, out, _ = typed(["", "^C", "   ", "/exit", "never read"])
    assert (status, out) == (0, "")


def test_ctrl_c_stops_the_reply_and_the_chat_goes_on(typed, monkeypatch):
    add = chat.Reply.add
    pressed: list[bool] = []

    def interrupted_add(self, chunk):
        if not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return add(self, chunk)

    monkeypatch.setattr(chat.Reply, "add", interrupted_add)
    before = signal.getsignal(signal.SIGINT)
    status, _, err = typed(["The king", "The queen"], "--temperature", "0", "--max-new-tokens", "30")
    facts = [line for line in err.splitlines() if "MLP neurons" in line]
    assert status == 0
    assert facts[0].endswith("[stopped]")
    assert " + 1 new tokens" in facts[0]
    assert " + 30 new tokens" in facts[1]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_conversation_says_so_and_goes_on_after_reset(typed):
    status, out, err = typed(["word " * 600, "/reset", "The king"])
    assert status == 0
    assert "exceed the model's 512 positions" in err
    assert err.count("MLP neurons") == 1
    assert out


def test_a_reply_is_as_long_as_there_is_room_for(typed):
    """512 positions: the second reply has not the 200 that were asked for, and the third none."""
    lines = ["word " * 100, "word " * 100, "word"]
    status, _, err = typed(lines, "--max-new-tokens", "200", "--temperature", "0", "--when-full", "wait")
    facts = [line for line in err.splitlines() if "MLP neurons" in line]
    counts = [tuple(map(int, re.search(r"(\d+) prompt.* \+ (\d+) new tokens", line).groups())) for line in facts]
    assert status == 0
    assert len(counts) == 2
    assert counts[0][1] == 200
    assert sum(counts[1]) == 512
    assert facts[1].endswith("[no room is left: /reset starts over]")
    assert "exceed the model's 512 positions" in err


def test_a_long_conversation_forgets_its_oldest_turns(typed, templated, monkeypatch):
    """And goes on with what a conversation of the others alone would say; what comes before them all stays."""
    asked = []
    encode = chat._encode

    def recorded(tokenizer, messages):
        asked.append(messages)
        return encode(tokenizer, messages)

    monkeypatch.setattr(chat, "_encode", recorded)
    lines = [f"{number} " + "word " * 60 for number in range(12)]
    status, _, err = typed(lines, "--system", "Be brief", "--temperature", "0", model=templated)
    assert (status, err.count("MLP neurons"), "error" in err) == (0, 12, False)
    assert re.search(r"\[no room was left: the oldest \d+ turns are forgotten\]", err)
    _, tokenizer = ci.load(templated)
    last = asked[-1]
    assert last[0] == {"role": "system", "content": "Be brief"}
    assert [message["role"] for message in last[1:]] == ["user", "assistant"] * (len(last) // 2 - 1) + ["user"]
    said = [message["content"].strip() for message in last if message["role"] == "user"]
    assert said == [line.strip() for line in lines][-len(said) :]
    assert len(encode(tokenizer, last)) + 12 <= 512


def test_trimming_keeps_the_last_turn_and_can_be_left_out(typed):
    """One line that is too long is refused in either way; a conversation that is left alone waits for /reset."""
    for how in ("trim", "wait"):
        _, _, err = typed(["The king", "word " * 600], "--when-full", how)
        assert "exceed the model's 512 positions" in err
    lines = ["word " * 100] * 6
    assert "exceed" not in typed(lines)[2]
    assert "exceed" in typed(lines, "--when-full", "wait")[2]


def test_a_mistake_leaves_what_was_read(typed, monkeypatch):
    """A line that is no text is refused; the next turn still finds the first one in the cache."""
    _, _, err = typed(["The king", "\udcff", "and the queen"], "--temperature", "0")
    assert "not valid text" in err
    assert " cached) + 12 new tokens" in err


@pytest.mark.parametrize("options", [["--regather-at", "0.1"], ["--lossless", "--regather-at", "2"]])
def test_core_neurons_that_cannot_follow_are_refused_before_the_first_turn(shallow, capsys, options):
    assert main(["chat", "--model", str(shallow["opt"]), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"coreinfer: error: regather_at=.*\n", err)


def test_a_second_ctrl_c_drops_the_turn(typed, shallow, monkeypatch):
    add = chat.Reply.add

    def interrupted_add(self, chunk):
        monkeypatch.setattr(chat.Reply, "add", add)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return add(self, chunk)

    monkeypatch.setattr(chat.Reply, "add", interrupted_add)
    status, out, err = typed(["The queen", "The king"], "--temperature", "0")
    assert status == 0
    assert "[interrupted]" in err
    assert out == reply_of(shallow["opt"], "The king") + "\n"


def test_a_system_message_needs_a_template(typed, templated):
    status, _, err = typed(["Hello"], "--system", "Be brief")
    assert status == 2
    assert "--system" in err
    _, out, _ = typed(["Hello"], "--system", "Be brief", "--temperature", "0", model=templated)
    assert out == reply_of(templated, "<system> Be brief\n<user> Hello\n<assistant>") + "\n"


def test_a_reply_ends_at_the_tokenizers_end_of_turn(typed, templated, tmp_path, capsys):
    """The config's EOS is another token, and the template ends a turn with one that the model makes in its reply."""
    params, tokenizer = ci.load(templated)
    prompt = tokenizer.encode("<user> Hello\n<assistant>")
    made = ci.generate(params, [prompt], ci.CoreConfig(beta=0.5), max_new_tokens=12).tokens[0].tolist()
    last = made[2]
    model = tmp_path / "model"
    shutil.copytree(templated, model)
    described = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    text = next(piece for piece, i in vocabulary.items() if i == last)
    declared = described.get("added_tokens_decoder", {}) | {str(last): {"content": text, "special": True}}
    end = "{{ '" + text + "' if message['role'] == 'assistant' else '' }}\n{% endfor %}"
    described |= {"added_tokens_decoder": declared, "chat_template": TEMPLATE.replace("\n{% endfor %}", end)}
    (model / "tokenizer_config.json").write_text(json.dumps(described))
    _, _, err = typed(["Hello"], "--temperature", "0", model=model)
    assert " + 3 new tokens" in err
    greedy = ["--beta", "0.5", "--temperature", "0", "--json"]
    assert main(["generate", "Hello", "--chat", "--model", str(model), *greedy]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == made[:3]


def test_generate_puts_a_system_message_before_the_question(capsys, templated):
    greedy = ["--beta", "0.5", "--max-new-tokens", "12", "--temperature", "0", "--json"]
    asked = ["generate", "Hello", "--chat", "--system", "Be brief", "--model", str(templated)]
    assert main([*asked, *greedy]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert text == reply_of(templated, "<system> Be brief\n<user> Hello\n<assistant>")
    assert main(["generate", "Hello", "--system", "Be brief"]) == 2
    assert "--system" in capsys.readouterr().err


def test_generate_applies_the_template(capsys, templated):
    greedy = ["--beta", "0.5", "--max-new-tokens", "12", "--temperature", "0", "--json"]
    assert main(["generate", "Hello", "--chat", "--model", str(templated), *greedy]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert text == reply_of(templated, "<user> Hello\n<assistant>")
    assert main(["generate", "Hello", "--chat"]) == 2
    assert "chat template" in capsys.readouterr().err
