"""The command line on a real small model: what it prints, and one line and status 2 for every mistake."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import pytest

import coreinfer_jax as ci
from coreinfer_jax.cli import generate as generate_command
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


def test_text_goes_to_stdout_and_one_line_of_facts_to_stderr(run, generate, model, tinystories):
    half = ("--beta", 0.5)
    status, out, err = run(
        "generate", PROMPT, "--model", tinystories, "--max-new-tokens", 24, "--dtype", "float32", *half
    )
    assert status == 0
    assert out == PROMPT + generate(*half)["text"] + "\n"
    neurons, tokens = model[0].config.mlp_size, len(model[1])
    told = rf"\[stability: 50% of {neurons} MLP neurons in 2 layers; {tokens} prompt \+ 24 new tokens; [^\n]*\]\n"
    assert re.fullmatch(told, err)


@pytest.mark.usefixtures("drafts_always")
def test_lossless_writes_what_all_neurons_write(run, generate, tinystories):
    full, asked = generate(), ("--max-new-tokens", 24, "--dtype", "float32", "--lossless", "--json")
    status, out, err = run("generate", PROMPT, "--model", tinystories, *asked)
    drafted = json.loads(out)
    assert (status, drafted["tokens"]) == (0, full["tokens"])
    assert drafted["stats"]["drafting"]["tokens"] == len(full["tokens"]) - 1
    assert re.search(r"; lossless: [1-9]\d* of", err)


@pytest.mark.parametrize(
    ("options", "core"),
    [
        ([], None),
        (["--method", "stability"], ci.CoreConfig()),
        pytest.param(["--method", "dense"], None, marks=pytest.mark.slow),
        (
            ["--rule", "votes", "--alpha", "0.3", "--beta", "0.7", "--budget", "mean"],
            ci.CoreConfig(beta=0.7, rule=ci.rules.Votes(alpha=0.3, budget="mean")),
        ),
    ],
    ids=["default", "stability", "dense", "mean"],
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


def test_a_special_token_is_a_stop_string(generate, model, tinystories, tmp_path):
    """It leaves no text behind; the model's tenth token is declared one here."""
    params, prompt = model
    tenth = int(ci.generate(params, [prompt], max_new_tokens=10).tokens[0, 9])
    directory = tmp_path / "model"
    shutil.copytree(tinystories, directory, copy_function=shutil.copyfile)
    pieces = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    word = next(piece for piece, i in pieces.items() if i == tenth)
    described = json.loads((directory / "tokenizer_config.json").read_text())
    described["added_tokens_decoder"][str(tenth)] = {"content": word, "special": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    stopped = generate("--stop", word, model=directory)
    assert stopped["tokens"] == generate()["tokens"][: len(stopped["tokens"])]
    assert stopped["tokens"].index(tenth) == len(stopped["tokens"]) - 1


def test_sampling_follows_the_seed(generate):
    drawn = [generate("--temperature", 1.0, "--top-k", 50, "--top-p", 0.95, "--seed", seed) for seed in (7, 7, 8)]
    tokens = [result["tokens"] for result in drawn]
    assert tokens[0] == tokens[1] != tokens[2]
    assert generate("--temperature", 1.0)["tokens"] == generate("--temperature", 1.0, "--seed", 0)["tokens"]
    assert generate("--temperature", 1.0, "--top-k", 1)["tokens"] == generate()["tokens"]


def test_sampling_defaults_to_what_the_model_recommends(run, generate, tinystories, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tinystories, model, copy_function=shutil.copyfile)

    def recommend(**fields: object) -> None:
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | fields))

    recommend(do_sample=True, temperature=0.9, top_k=20, top_p=0.95)
    drawn = generate("--temperature", 0.9, "--top-k", 20, "--top-p", 0.95)["tokens"]
    assert generate(model=model)["tokens"] == drawn != generate()["tokens"]
    assert generate("--temperature", 0, model=model)["tokens"] == generate()["tokens"]
    assert generate("--top-k", 1, model=model)["tokens"] == generate()["tokens"]
    recommend(do_sample=False, temperature=0.9)
    assert generate(model=model)["tokens"] == generate()["tokens"]
    recommend(do_sample=True)  # transformers draws among the 50 most probable where a file says no more
    drawn = generate("--temperature", 2, "--top-k", 50)["tokens"]
    assert generate("--temperature", 2, model=model)["tokens"] == drawn != generate("--temperature", 2)["tokens"]
    recommend(do_sample=True, temperature=2.0, top_k=0)
    assert generate(model=model)["tokens"] == generate("--temperature", 2)["tokens"]
    recommend(repetition_penalty=1.8, no_repeat_ngram_size=2)
    penalised = generate("--repetition-penalty", 1.8, "--no-repeat-ngram-size", 2)["tokens"]
    assert generate(model=model)["tokens"] == penalised != generate()["tokens"]
    recommend(do_sample=True, temperature="hot", top_p=7, min_p=-1)
    assert_refused(run("generate", PROMPT, "--model", model), f"{model / 'generation_config.json'}: temperature='hot'")
    assert generate("--temperature", 0, model=model)["tokens"] == generate()["tokens"]


def test_recommendations_that_are_not_honoured_are_named(run, tinystories, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tinystories, model, copy_function=shutil.copyfile)
    fields = {"do_sample": True, "typical_p": 0.9, "bad_words_ids": [[5]], "max_length": 4096, "num_beams": 1}
    (model / "generation_config.json").write_text(json.dumps(fields))
    status, _, err = run("generate", PROMPT, "--model", model, "--max-new-tokens", 2)
    assert status == 0
    named, _ = err.splitlines()
    assert named == f"[{model / 'generation_config.json'}: not honoured: typical_p=0.9, bad_words_ids=[[5]]]"
    status, _, err = run("generate", PROMPT, "--model", model, "--max-new-tokens", 2, "--temperature", 0)
    assert (status, err.count("\n")) == (0, 1)


@pytest.mark.parametrize("options", [["--top-p", "0.9", "--seed", "7"], ["--top-k", "4", "--temperature", "0"]])
def test_options_of_drawing_where_nothing_is_drawn(run, tinystories, options):
    status, _, err = run("generate", PROMPT, "--model", tinystories, "--max-new-tokens", 2, *options)
    assert status == 0
    named = ", ".join(option for option in options if option.startswith("--") and option != "--temperature")
    assert err.splitlines()[0] == f"[{named}: without effect where nothing is drawn; add a --temperature above 0]"
    status, _, err = run(
        "generate", PROMPT, "--model", tinystories, "--max-new-tokens", 2, "--temperature", 1, "--seed", 7
    )
    assert (status, err.count("\n")) == (0, 1)


def test_a_converted_model_generates_the_same(run, generate, tinystories, tmp_path):
    status, out, err = run("convert", tinystories, tmp_path / "native")
    assert (status, out, err) == (0, f"{tmp_path / 'native'}\n", "")
    assert generate(model=tmp_path / "native")["tokens"] == generate()["tokens"]


def test_commands_in_processes_of_their_own(tinystories, tmp_path, generate):
    """`python -m convert` in the repository, and the `coreinfer` script in another directory."""
    native = tmp_path / "native"
    convert = [sys.executable, "-m", "convert", tinystories, native, "--dtype", "bfloat16"]
    script = [Path(sys.executable).parent / "coreinfer", "generate", PROMPT, "--model", native, "--device", "cpu"]
    options = ["--dtype", "float32", "--max-new-tokens", "8"]
    repository = Path(__file__).resolve().parents[1]
    done = [
        subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
        for command, folder in ((convert, repository), (script + options, tmp_path))
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
    (["--min-p", "2"], "min_p=2.0"),
    (["--repetition-penalty", "0"], "repetition_penalty=0.0"),
    (["--no-repeat-ngram-size", "-1"], "no_repeat_ngram_size=-1"),
    (["--regather-at", "0.1"], "regather_at=0.1: is of lossless generation"),
    (["--lossless", "--regather-at", "2"], "regather_at=2.0: give a share"),
    (["--top-k", "0"], "top_k=0"),
    (["--max-new-tokens", "0"], "max_new_tokens=0"),
    (["--max-new-tokens", "-3"], "max_new_tokens=-3"),
    (["--max-new-tokens", "10000"], "max_new_tokens=10000"),
    (["--max-new-tokens", "many"], "'many'"),
    (["--stop", ""], "--stop ''"),
    (["--stop", "\udcff"], "--stop text"),
    (["--temperature", "1e300"], "temperature=1e+300"),
    (["--model", ""], "path=''"),
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


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run"], "TEXT"),
        (["run", "nowhere.txt"], "nowhere.txt: No such file"),
        (["run", "text.txt", "--family", "gpt"], "'gpt'"),
        (["run", "text.txt", "--steps", "many"], "'many'"),
        (["run", "text.txt", "--steps", "0"], "steps=0"),
        (["run", "text.txt", "--learning-rate", "nan"], "learning_rate=nan"),
        (["run", "text.txt", "--hidden-size", "10", "--num-heads", "3"], "hidden_size=10"),
        (["run", "text.txt", "--dtype", "float16"], "'float16'"),
        (["run", "text.txt"], "text.txt: 1 document(s)"),
        (["run", "two.txt", "--init-from", "nowhere"], "nowhere: no such directory"),
        (["run", "two.txt", "--init-from", "embedded:llama"], "family llama instead of opt"),
    ],
    ids=shortened,
)
def test_mistakes_in_training(run, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one document")
    (tmp_path / "two.txt").write_text("one\n<|endoftext|>\ntwo")
    assert_refused(run("train", *arguments), named)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["text.txt", "two.txt"]


def test_training(run, tmp_path, monkeypatch):
    """Every option reaches the recipe: the run states it."""
    (tmp_path / "text.txt").write_text("".join(f"Tale {i} of a king.\n<|endoftext|>\n" for i in range(200)))
    sizes = {"vocab_size": 300, "hidden_size": 8, "mlp_size": 16, "num_layers": 1, "num_heads": 2}
    schedule = {"sequence": 8, "batch": 2, "steps": 3, "warmup": 1, "learning_rate": 0.01}
    others = {"weight_decay": 0.2, "clip": 2.0, "seed": 5, "dtype": "float32", "family": "llama"}
    recipe = sizes | schedule | others
    options = [word for name, value in recipe.items() for word in (f"--{name.replace('_', '-')}", value)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        status, out, err = run("train", tmp_path / "run", tmp_path / "text.txt", *options)
    assert status == 0, err
    assert out == f"{tmp_path / 'run' / 'model'}\n"
    assert json.loads((tmp_path / "run" / "model" / "training.json").read_text())["recipe"] == recipe


SHELL = [
    ("info embedded:opt | true", (0, 141), r""),
    (
        "info embedded:opt >/dev/full",
        (2,),
        r"coreinfer: error: the output cannot be written: No space left on device[^\n]*\n",
    ),
    (f"generate {PROMPT!r} --max-new-tokens 2 2>/dev/full", (0,), r""),
    ("info nowhere 2>&-", (2,), r""),
    ("chat <&-", (0,), r"\[no chat template[^\n]*\n\[/reset[^\n]*\n\n"),
    pytest.param("info nowhere 2>/dev/full", (2,), r"", marks=pytest.mark.slow),
    pytest.param("info embedded:opt --json 2>&-", (0,), r"", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("line", "statuses", "told"), SHELL)
def test_streams_that_are_closed_or_full(line, statuses, told):
    """In a process of its own, whose status comes before any pipe."""
    script = Path(sys.executable).parent / "coreinfer"
    words, _, rest = line.partition(" |")
    pipe = f" |{rest}" if rest else ""
    command = f"unset PYTHONUNBUFFERED; {script} {words}{pipe}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in statuses, done
    assert re.fullmatch(told, done.stderr), done
    assert "error" not in done.stdout


@pytest.mark.parametrize(
    "error", [MemoryError("mmap"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_too_little_memory(run, monkeypatch, error):
    monkeypatch.setattr(generate_command, "stream", lambda *arguments, **settings: (_ for _ in ()).throw(error))
    assert_refused(run("generate", PROMPT), "out of memory")


def test_control_characters_stay_out_of_the_terminal(run):
    assert_refused(run("generate", PROMPT, "--\x1b[31mred"), r"--\x1b[31mred")
    assert_refused(run("info", "no\x1b[31mred"), r"no\x1b[31mred: no such directory")


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_a_device_that_is_not_there(run, tinystories, device):
    if jax.default_backend() == device:
        pytest.skip(f"there is a {device}")
    assert_refused(run("generate", PROMPT, "--model", tinystories, "--device", device), f"--device {device}")


@pytest.mark.parametrize("platform", ["cuda", "abacus", pytest.param("tpu", marks=pytest.mark.slow)])
def test_a_platform_that_is_not_there(platform):
    command = [
        sys.executable,
        "-c",
        "import sys; from coreinfer_jax.cli import main; sys.exit(main())",
        "generate",
        PROMPT,
    ]
    environment = {**os.environ, "JAX_PLATFORMS": platform}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert_refused((done.returncode, done.stdout, done.stderr), f"JAX_PLATFORMS={platform}: ")


def test_a_prompt_from_a_file_or_from_standard_input(run, generate, tinystories, tmp_path, monkeypatch):
    expected = generate()["tokens"]
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    options = ["--model", tinystories, "--max-new-tokens", 24, "--dtype", "float32", "--json"]
    assert json.loads(run("generate", "--file", file, *options)[1])["tokens"] == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert json.loads(run("generate", "-", *options)[1])["tokens"] == expected
    long = " ".join(["word"] * 28_000)  # 140 kB: more than an argument may be long, and than this model reads
    file.write_text(long)
    assert_refused(run("generate", "--file", file, *options), "shorten the prompt")
    monkeypatch.setattr(sys, "stdin", io.StringIO(long))
    assert_refused(run("generate", "-", *options), "shorten the prompt")


def test_prompts_that_cannot_be_read(run, tinystories, tmp_path, monkeypatch):
    pipe, latin, large = tmp_path / "pipe", tmp_path / "latin", tmp_path / "large"
    os.mkfifo(pipe)
    latin.write_bytes("K\xf6nig".encode("latin-1"))
    with large.open("wb") as stream:
        stream.truncate(2**40)
    for file in (tmp_path, tmp_path / "missing", pipe, latin, large):
        assert_refused(run("generate", "--file", file, "--model", tinystories), str(file))
    assert_refused(run("generate", PROMPT, "--file", latin, "--model", tinystories), "--file FILE")
    for empty in ("", "\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(empty))
        assert_refused(run("generate", "-", "--model", tinystories), "empty")


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
