"""The command line on a real small model: what it prints, and one line and status 2 for every mistake."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import pytest

import coreinfer_jax as ci
from coreinfer_jax.cli import main
from coreinfer_jax.text import load_tokenizer
from tests.support import OPT
from tests.test_checkpoint import hub_tensors, write_hub

PROMPT = "Once upon a time"


@pytest.fixture
def run(capsys):
    """Runs the command line in this process: status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def generate(run, tinystories):
    """`coreinfer generate --json` on the small model: the object printed."""

    def generate(*options: object, prompt: str = PROMPT, model: Path = tinystories, new: int = 24) -> dict:
        status, out, err = run(
            "generate", prompt, "--model", model, "--max-new-tokens", new, "--dtype", "float32", "--json", *options
        )
        assert status == 0, err
        return json.loads(out.splitlines()[-1])

    return generate


@pytest.fixture(scope="module")
def model(tinystories: Path) -> tuple[ci.Params, list[int]]:
    """The small model, and the ids of PROMPT."""
    params, tokenizer = ci.load(tinystories, "float32")
    assert tokenizer is not None
    return params, tokenizer.encode(PROMPT)


def test_text_goes_to_stdout_and_one_line_of_facts_to_stderr(run, generate, tinystories):
    status, out, err = run("generate", PROMPT, "--model", tinystories, "--max-new-tokens", 24, "--dtype", "float32")
    assert status == 0
    assert out == PROMPT + generate()["text"] + "\n"
    assert re.fullmatch(r"\[stability: 40% of 384 MLP neurons in 2 layers; 6 prompt \+ 24 new tokens; [^\n]*\]\n", err)


@pytest.mark.parametrize(
    ("options", "core"),
    [
        ([], ci.CoreConfig()),
        (["--method", "dense"], None),
        (["--alpha", "0.3", "--beta", "0.7", "--budget", "mean"], ci.CoreConfig(0.3, 0.7, "mean")),
    ],
    ids=["default", "dense", "mean"],
)
def test_json_holds_what_generate_returns(generate, model, tinystories, options, core):
    params, prompt = model
    expected = ci.generate(params, [prompt], core, max_new_tokens=24, eos_ids=params.config.eos_ids)
    result = generate(*options)
    assert set(result) == {"text", "tokens", "method", "stats"}
    assert result["tokens"] == expected.tokens[0, : expected.lengths[0]].tolist()
    assert result["method"] == result["stats"]["method"] == expected.stats.method
    assert result["stats"]["kept_neurons"] == list(expected.stats.kept_neurons)
    assert PROMPT + result["text"] == load_tokenizer(tinystories).decode(prompt + result["tokens"])


@pytest.mark.parametrize("new", [1, 2, 9, 40])
def test_max_new_tokens(generate, new):
    result = generate(new=new)
    assert len(result["tokens"]) == new
    assert result["stats"]["decode_steps"] == new - 1
    assert result["tokens"] == generate(new=40)["tokens"][:new]


def test_new_tokens_default_to_the_room_there_is(run, tinystories):
    status, out, _ = run("generate", "a " * 450, "--model", tinystories, "--json")
    result = json.loads(out)
    assert status == 0
    room = 512 - result["stats"]["prompt_tokens"][0]
    assert 0 < room < 128
    assert len(result["tokens"]) == room or result["tokens"][-1] == 2  # EOS


def test_stop_strings_cut_the_text_before_them(run, generate, tinystories):
    text = generate()["text"]
    for stop in (text[3:4], text[10:25], text[-1:], text[20:22]):
        cut = text[: text.index(stop)]
        assert generate("--stop", stop)["text"] == cut
        assert generate("--stop", "never said", "--stop", stop)["text"] == cut
    _, out, _ = run(
        "generate", PROMPT, "--model", tinystories, "--max-new-tokens", 24, "--dtype", "float32", "--stop", text[10:25]
    )
    assert out == PROMPT + text[: text.index(text[10:25])] + "\n"


def test_a_stop_string_that_only_begins_is_printed(generate):
    text = generate()["text"]
    assert generate("--stop", text[-5:] + "\0never")["text"] == text


def test_sampling_follows_the_seed(generate):
    drawn = [generate("--temperature", 1.0, "--top-k", 50, "--top-p", 0.95, "--seed", seed) for seed in (7, 7, 8)]
    tokens = [result["tokens"] for result in drawn]
    assert tokens[0] == tokens[1] != tokens[2]
    assert generate("--temperature", 1.0)["tokens"] == generate("--temperature", 1.0, "--seed", 0)["tokens"]
    assert generate("--temperature", 1.0, "--top-k", 1)["tokens"] == generate()["tokens"]


def test_a_converted_model_generates_the_same(run, generate, tinystories, tmp_path):
    status, out, err = run("convert", tinystories, tmp_path / "native")
    assert (status, out, err) == (0, f"{tmp_path / 'native'}\n", "")
    assert generate(model=tmp_path / "native")["tokens"] == generate()["tokens"]


def test_installed_commands(tinystories, tmp_path, generate):
    """`python -m convert` and the `coreinfer` script, in processes of their own and another directory."""
    native = tmp_path / "native"
    convert = [sys.executable, "-m", "convert", tinystories, native, "--dtype", "bfloat16"]
    script = [Path(sys.executable).parent / "coreinfer", "generate", PROMPT, "--model", native, "--device", "cpu"]
    options = ["--dtype", "float32", "--max-new-tokens", "8"]
    done = [
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        for command in (convert, script + options)
    ]
    assert [process.returncode for process in done] == [0, 0], done
    assert done[0].stdout == f"{native}\n"
    assert done[1].stdout == PROMPT + generate(model=native, new=8)["text"] + "\n"
    assert done[1].stderr.count("\n") == 1


def test_version_and_help(run):
    assert run("--version") == (0, f"coreinfer {version('coreinfer_jax')}\n", "")
    for arguments in (["--help"], ["generate", "--help"], ["convert", "--help"]):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "")
        assert out.startswith("usage: coreinfer")


GENERATE_MISTAKES = [
    (["--bogus", "1"], "--bogus"),
    (["--bogus=two\nlines"], "--bogus"),
    (["--temp", "1"], "--temp"),
    (["--alpha", "much"], "'much'"),
    (["--alpha", "0"], "alpha=0.0"),
    (["--alpha", "nan"], "alpha=nan"),
    (["--beta", "1.5"], "beta=1.5"),
    (["--budget", "huge"], "'huge'"),
    (["--method", "magic"], "'magic'"),
    (["--temperature", "-1"], "temperature=-1.0"),
    (["--temperature", "1", "--seed", "99999999999999999999999"], "99999999999999999999999"),
    (["--top-p", "2"], "top_p=2.0"),
    (["--top-k", "0"], "top_k=0"),
    (["--max-new-tokens", "0"], "max_new_tokens=0"),
    (["--max-new-tokens", "-3"], "max_new_tokens=-3"),
    (["--max-new-tokens", "10000"], "max_new_tokens=10000"),
    (["--max-new-tokens", "many"], "'many'"),
    (["--stop", ""], "--stop ''"),
    (["--dtype", "int4"], "dtype=int4"),
    (["--model", "/no/such/model"], "/no/such/model"),
    (["--model", "m" * 300], "m" * 300),
    (["--device", "abacus"], "'abacus'"),
]


def shortened(value: list[str] | str) -> str:
    return (value if isinstance(value, str) else " ".join(value))[:30]


def assert_refused(result: tuple[int, str, str], named: str) -> None:
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("coreinfer")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert named in err


@pytest.mark.parametrize(("options", "named"), GENERATE_MISTAKES, ids=shortened)
def test_mistakes_in_options(run, tinystories, options, named):
    model = [] if "--model" in options else ["--model", tinystories]
    assert_refused(run("generate", PROMPT, *model, *options), named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["teleport"], "'teleport'"),
        (["generate", "--model", "."], "PROMPT"),
        (["generate", PROMPT], "--model"),
        (["generate", "", "--model", "."], "prompt is empty"),
        (["generate", "two", "prompts", "--model", "."], "prompts"),
        (["convert", "only-a-source"], "DST"),
        (["convert", "/no/such/model", "native"], "/no/such/model"),
        (["convert", "m" * 300, "native"], "m" * 300),
    ],
    ids=shortened,
)
def test_mistakes_in_arguments(run, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    assert_refused(run(*arguments), named)


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_a_device_that_is_not_there(run, tinystories, device):
    if jax.default_backend() == device:
        pytest.skip(f"there is a {device}")
    assert_refused(run("generate", PROMPT, "--model", tinystories, "--device", device), f"--device {device}")


def test_a_prompt_that_is_no_unicode(run, tinystories):
    """What Python makes of a shell argument with a byte that is not UTF-8."""
    assert_refused(run("generate", "caf\udce9", "--model", tinystories), r"caf\udce9")


def test_a_prompt_longer_than_the_model(run, tinystories):
    assert_refused(run("generate", "a " * 600, "--model", tinystories), "512 positions")


def test_a_model_without_a_tokenizer(run, tmp_path):
    hub = write_hub(tmp_path / "hub", OPT, hub_tensors(OPT))
    assert_refused(run("generate", PROMPT, "--model", hub), f"{hub}: has no tokenizer")


def test_convert_mistakes(run, tinystories, tmp_path):
    assert_refused(run("convert", tinystories, tmp_path), f"{tmp_path}: exists already")
    assert_refused(run("convert", tinystories, tmp_path / "native", "--dtype", "int4"), "dtype=int4")
    assert list(tmp_path.iterdir()) == []
