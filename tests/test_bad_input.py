"""Every mistake a caller can make in Python is one `CoreInferError` of one line that names what is wrong."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import coreinfer_jax as ci
from coreinfer_jax.files import new_directory
from coreinfer_jax.io.export import write_hugging_face
from coreinfer_jax.lab.training import Recipe, checkpoints, train, trainer
from coreinfer_jax.lab.training.checkpoints import History, save_state
from coreinfer_jax.lab.training.preparation import CHECKPOINT, TOKENS
from coreinfer_jax.lab.training.recipe import TrainState, initial_params, initial_state, model_config
from coreinfer_jax.model.weights import Params
from tests.support import LLAMA, OPT, random_model
from tests.test_checkpoint import hub_tensors, write_hub

V, F, L, P = OPT.vocab_size, OPT.mlp_size, OPT.num_layers, OPT.max_positions
PROMPT = [5, 6, 7]
ASSETS = Path(ci.__file__).parent / "assets"
KEPT = np.arange(10)

opt = cache(lambda: random_model(OPT))
llama = cache(lambda: random_model(LLAMA))


def core(indices: object = KEPT, layers: int = L) -> ci.CoreNeurons:
    return ci.CoreNeurons([indices] * layers)


def core_rows(rows: int, kept: int = 10) -> ci.CoreNeurons:
    return core(np.tile(np.arange(kept), (rows, 1)))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ci.CoreInferError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000 or "m" * 300 in message  # a name as long as that was given
    return message


def table(mistakes: dict[str, tuple[object, str]]) -> pytest.MarkDecorator:
    """A test's cases, from name -> (mistake, what the message must hold)."""
    cases = [pytest.param(mistake, named, id=name) for name, (mistake, named) in mistakes.items()]
    return pytest.mark.parametrize(("mistake", "named"), cases)


CALLS = {
    "generate": lambda tokens, **settings: ci.generate(opt(), tokens, **settings),
    "stream": lambda tokens, **settings: ci.stream(opt(), tokens, **settings),
    "forward": lambda tokens, **settings: ci.forward(opt(), tokens, **settings),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@table(
    {
        "no rows": ([], "no rows"),
        "no rows in an array": (np.zeros((0, 4), int), "no rows"),
        "an empty row": ([[]], "row 0 is empty"),
        "an empty second row": ([PROMPT, []], "row 1 is empty"),
        "a flat list": (PROMPT, "flat list"),
        "a flat array": (np.array(PROMPT), "shape (3,)"),
        "three axes": (np.zeros((1, 2, 3), int), "shape (1, 2, 3)"),
        "three axes in lists": ([[[5, 6]]], "list"),
        "ragged within a row": ([[5, [6, 7]]], "row 0"),
        "floats": ([[5.0, 6.0]], "row 0 holds float64"),
        "float array": (np.ones((1, 3), np.float32), "row 0 holds float32"),
        "bools": ([[True, False]], "row 0 holds bool"),
        "the vocabulary's size": ([PROMPT, [5, V]], f"row 1 holds id {V}"),
        "a huge id": ([[2**40]], f"row 0 holds id {2**40}"),
        "a negative id": ([[5, -1]], "row 0 holds id -1"),
        "text": ("Once upon a time", "str"),
        "a list of texts": (["Once", "upon"], "str"),
        "None": (None, "NoneType"),
        "a number": (5, "int"),
    }
)
def test_tokens(call, mistake, named):
    message = refusal(lambda: call(mistake))
    assert message.startswith("tokens")
    assert named in message


@pytest.mark.parametrize("call", [CALLS["generate"], CALLS["stream"]], ids=["generate", "stream"])
@table(
    {
        "nothing to make": ({"max_new_tokens": 0}, "max_new_tokens=0"),
        "less than nothing": ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        "half a token": ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
        "beyond the positions": ({"max_new_tokens": P - 2}, f"3 prompt tokens + max_new_tokens={P - 2} exceed"),
        "temperature below 0": ({"temperature": -0.5, "key": 0}, "temperature=-0.5"),
        "temperature NaN": ({"temperature": float("nan"), "key": 0}, "temperature=nan"),
        "temperature infinite": ({"temperature": float("inf"), "key": 0}, "temperature=inf"),
        "temperature without key": ({"temperature": 1.0}, "give key"),
        "temperature of text": ({"temperature": "hot", "key": 0}, "temperature='hot'"),
        "temperature beyond float32": ({"temperature": 1e-39, "key": 0}, "temperature=1e-39"),
        "several keys": ({"temperature": 1.0, "key": jax.random.split(jax.random.key(0), 2)}, "key of shape (2,)"),
        "key of a float": ({"temperature": 1.0, "key": np.float32(3)}, "key of shape (), float32"),
        "key True": ({"temperature": 1.0, "key": True}, "key=True"),
        "seed too large": ({"temperature": 1.0, "key": 2**80}, str(2**80)),
        "key of text": ({"temperature": 1.0, "key": "seed"}, "'seed'"),
        "key an array of text": ({"temperature": 1.0, "key": np.array("x")}, "key=array('x'"),
        "temperature of thousands of digits": ({"temperature": 10**5000, "key": 0}, "temperature=a int of thousands"),
        "temperature above float32": ({"temperature": 1e300, "key": 0}, "temperature=1e+300"),
        "temperature complex": ({"temperature": 1j, "key": 0}, "temperature=1j"),
        "tokens of thousands of digits": ({"max_new_tokens": 10**5000}, "max_new_tokens=a int of thousands"),
        "eos an array without axes": ({"eos_ids": np.array(2)}, "eos_ids=array(2)"),
        "core the params": ({"core": opt()}, "core=Params("),
        "min_p above 1": ({"min_p": 1.1}, "min_p=1.1"),
        "min_p NaN": ({"min_p": float("nan")}, "min_p=nan"),
        "no penalty": ({"repetition_penalty": 0}, "repetition_penalty=0"),
        "a penalty beyond float32": ({"repetition_penalty": 1e39}, "repetition_penalty=1e+39"),
        "a penalty of text": ({"repetition_penalty": "1.1"}, "repetition_penalty='1.1'"),
        "n-grams of -1": ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        "n-grams of 1.5": ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size=1.5"),
        "top_k 0": ({"top_k": 0}, "top_k=0"),
        "top_k -1": ({"top_k": -1}, "top_k=-1"),
        "top_k 1.5": ({"top_k": 1.5}, "top_k=1.5"),
        "top_p 0": ({"top_p": 0.0}, "top_p=0.0"),
        "top_p above 1": ({"top_p": 1.5}, "top_p=1.5"),
        "top_p NaN": ({"top_p": float("nan")}, "top_p=nan"),
        "eos beyond the vocabulary": ({"eos_ids": (2, V)}, f"eos_ids: {V}"),
        "eos negative": ({"eos_ids": [-1]}, "eos_ids: -1"),
        "eos not in a tuple": ({"eos_ids": 2}, "eos_ids"),
        "eos a float": ({"eos_ids": [2.5]}, "eos_ids: 2.5"),
        "core a name": ({"core": "stability"}, "'stability'"),
        "layers that select none": ({"core": ci.CoreConfig(layers=(0.9, 1.0))}, "layers=(0.9, 1.0)"),
        "too few layers": ({"core": core(layers=2)}, f"2 layers, but the model has {L}"),
        "too many layers": ({"core": core(layers=4)}, f"4 layers, but the model has {L}"),
        "another model's neurons": ({"core": core([0, F])}, f"layer 0 reach index {F}"),
        "sets for other rows": ({"core": core_rows(2)}, "2 rows, but tokens have 1"),
    }
)
def test_settings(call, mistake, named):
    assert named in refusal(lambda: call([PROMPT], **mistake))


@pytest.mark.parametrize("prompts", [[[2]], [[2], PROMPT], [PROMPT, [2]]], ids=str)
def test_a_prompt_of_bos_alone_has_no_vote_to_leave_out(prompts):
    setting = ci.CoreConfig(count_bos=False)
    assert "count_bos=False" in refusal(lambda: ci.generate(opt(), prompts, setting))


def test_the_last_position_can_be_used():
    assert ci.generate(opt(), [[5] * (P - 1)], None, max_new_tokens=1).lengths.tolist() == [1]
    message = refusal(lambda: ci.generate(opt(), [[5] * P], ci.CoreConfig(), max_new_tokens=1))
    assert f"{P} prompt tokens + max_new_tokens=1 exceed the model's {P} positions" in message


@table(
    {
        "beyond the positions": (lambda: ci.forward(opt(), [[5] * (P + 1)]), f"{P + 1} tokens exceed"),
        "unequal rows": (lambda: ci.forward(opt(), [[5, 6], [5]]), "unequal lengths"),
        "too few layers": (lambda: ci.forward(opt(), [PROMPT], core(layers=2)), "2 layers"),
        "sets for other rows": (lambda: ci.forward(opt(), [PROMPT], core_rows(2)), "2 rows, but tokens have 1"),
        "a choice, not a set": (lambda: ci.forward(opt(), [PROMPT], ci.CoreConfig()), "CoreConfig"),
        "narrowed for other rows": (lambda: ci.forward(ci.compact(opt(), core_rows(2)), [PROMPT] * 3), "2 rows"),
        "compact: what load returns": (lambda: ci.compact((opt(), None), core()), "params: tuple"),
        "compact: None": (lambda: ci.compact(None, core()), "params: NoneType"),
        "converse: ragged": (lambda: ci.converse(opt(), [1, [2, 3]]), "flat list"),
        "converse: the params twice": (lambda: ci.converse(opt(), [5], opt()), "conversation=Params("),
        "compact: too few layers": (lambda: ci.compact(opt(), core(layers=2)), "2 layers"),
        "compact: another model's": (lambda: ci.compact(opt(), core([0, F])), f"index {F}"),
        "compact: a choice, not a set": (lambda: ci.compact(opt(), ci.CoreConfig()), "CoreConfig"),
    }
)
def test_forward_and_compact(mistake, named):
    assert named in refusal(mistake)


@pytest.mark.parametrize(
    "use",
    [
        lambda params: ci.generate(params, [PROMPT], ci.CoreConfig()),
        lambda params: ci.stream(params, [PROMPT], None),
        lambda params: ci.compact(params, core()),
        lambda params: ci.forward(params, [PROMPT], core()),
    ],
    ids=["generate", "stream", "compact", "forward"],
)
@pytest.mark.parametrize(
    "narrowing",
    [core(), core_rows(1), core_rows(1, F), ci.CoreNeurons([None, None, KEPT])],
    ids=["shared", "per row", "per row, all of them", "one layer"],
)
def test_narrowed_params_are_not_narrowed_again(use, narrowing):
    narrowed = ci.compact(opt(), narrowing)
    assert "narrowed to core neurons already" in refusal(lambda: use(narrowed))


FRACTIONS = [0, 0.0, -0.1, 1.0001, 5, float("nan"), float("inf"), 0.5j]


@pytest.mark.parametrize("value", FRACTIONS)
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_shares(name, value):
    setting = {"alpha": ci.rules.Votes, "beta": ci.CoreConfig}[name]
    assert f"{name}={value}: " in refusal(lambda: setting(**{name: value}))
    assert f"{name}={value}: " in refusal(lambda: ci.select_core_neurons(jnp.ones((3, 5)), **{name: value}))


@pytest.mark.parametrize("value", ["no", [], 1, None])
@pytest.mark.parametrize("name", ["per_row", "count_bos"])
def test_switches(name, value):
    assert f"{name}={value!r}: give True or False" in refusal(lambda: ci.CoreConfig(**{name: value}))


@pytest.mark.parametrize("budget", ["", "median", "MEAN", None])
def test_budgets(budget):
    assert f"budget={budget!r}" in refusal(lambda: ci.rules.Votes(budget=budget))
    assert f"budget={budget!r}" in refusal(lambda: ci.select_core_neurons(jnp.ones((3, 5)), budget=budget))


@pytest.mark.parametrize(
    "layers", [(0.5, 0.2), (0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.0, float("nan")), (0.5,), (0.0, 0.5, 1.0), 0.5]
)
def test_layer_ranges(layers):
    assert f"layers={layers}" in refusal(lambda: ci.CoreConfig(layers=layers))


@table(
    {
        "NaN": (np.full((3, 5), np.nan, np.float32), "NaN"),
        "one NaN": (np.diag([1.0, np.nan, 1.0]).astype(np.float32), "NaN"),
        "infinity": (np.full((3, 5), np.inf, np.float32), "infinity"),
        "integers": (np.ones((3, 5), np.int32), "int32"),
        "one axis": (np.ones(5, np.float32), "(5,)"),
        "three axes": (np.ones((2, 3, 5), np.float32), "(2, 3, 5)"),
        "no tokens": (np.ones((0, 5), np.float32), "(0, 5)"),
        "no neurons": (np.ones((3, 0), np.float32), "(3, 0)"),
    }
)
def test_activations(mistake, named):
    message = refusal(lambda: ci.select_core_neurons(jnp.asarray(mistake)))
    assert message.startswith("activations ")
    assert named in message


@table(
    {
        "unsorted": ([3, 1], "ascending"),
        "repeated": ([1, 1], "each once"),
        "negative": ([-1, 1], ">= 0"),
        "empty": ([], "(0,)"),
        "an empty row": (np.zeros((2, 0), int), "(2, 0)"),
        "no rows": (np.zeros((0, 2), int), "(0, 2)"),
        "floats": ([0.0, 1.0], "float64"),
        "bools": ([False, True], "bool"),
        "a number": (3, "shape ()"),
        "three axes": (np.zeros((1, 1, 1), int), "(1, 1, 1)"),
        "unsorted in a row": ([[0, 1], [1, 0]], "ascending"),
        "rows of unequal size": ([[0, 1], [0]], "layer 1"),
        "beyond int32": ([0, 2**32 + 1], str(2**32 + 1)),
        "text": ("0, 1", "<U4"),
    }
)
def test_core_neurons(mistake, named):
    message = refusal(lambda: ci.CoreNeurons([None, mistake]))
    assert message.startswith("core neurons of layer 1")
    assert named in message


def test_core_neurons_of_different_numbers_of_rows():
    message = refusal(lambda: ci.CoreNeurons([np.zeros((2, 1), int), np.zeros((3, 1), int)]))
    assert "different numbers of rows" in message


def with_nan_embedding(params: Params, ids: list[int]) -> Params:
    return params.replace(token_embedding=params.token_embedding.at[jnp.asarray(ids)].set(jnp.nan))


def test_nan_logits_of_the_prefill():
    damaged = with_nan_embedding(llama(), [6])
    assert "logits are NaN or infinite" in refusal(
        lambda: ci.generate(damaged, [PROMPT], ci.CoreConfig(), max_new_tokens=1)
    )
    chunks = ci.stream(damaged, [PROMPT], ci.CoreConfig())
    assert "logits are NaN or infinite" in refusal(lambda: next(chunks))


def test_infinite_logits():
    weight = llama().unembedding
    assert weight is not None
    damaged = llama().replace(unembedding=weight.at[3].set(jnp.inf))
    assert "logits are NaN or infinite" in refusal(
        lambda: ci.generate(damaged, [PROMPT], ci.CoreConfig(), max_new_tokens=1)
    )


@pytest.mark.parametrize("method", [None, ci.CoreConfig()], ids=["dense", "stability"])
def test_nan_logits_of_the_decoding(method):
    """The model breaks at the first token it made itself: the prefill and its token are still good."""
    good = ci.generate(llama(), [PROMPT], method, max_new_tokens=1)
    damaged = with_nan_embedding(llama(), good.tokens[0].tolist())
    chunks = ci.stream(damaged, [PROMPT], method, max_new_tokens=3)
    assert next(chunks).tokens.tolist() == good.tokens.tolist()
    assert "logits are NaN or infinite" in refusal(lambda: next(chunks))
    assert "logits are NaN or infinite" in refusal(lambda: ci.generate(damaged, [PROMPT], method, max_new_tokens=3))


@pytest.mark.parametrize("tokens", [np.array([PROMPT], np.uint8), jnp.asarray([PROMPT]), (tuple(PROMPT),)], ids=type)
def test_what_is_no_mistake(tokens):
    """The forms tokens, counts and keys may take beside lists and ints."""
    key = jax.random.key(3)
    expected = ci.generate(opt(), [PROMPT], ci.CoreConfig(), max_new_tokens=4, temperature=1.0, key=3).tokens
    for new, same_key in ((np.int64(4), key), (4, jax.random.key_data(key)), (4, np.int64(3))):
        made = ci.generate(opt(), tokens, ci.CoreConfig(), max_new_tokens=new, temperature=1.0, key=same_key).tokens
        np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("call", [ci.generate, ci.stream, ci.forward])
def test_what_load_returns_is_not_params_yet(call):
    assert "params: tuple" in refusal(lambda: call((opt(), None), [[5, 6]]))


def test_forward_with_nan_weights():
    poisoned = opt().replace(token_embedding=opt().token_embedding.at[7, 0].set(jnp.nan))
    assert "NaN" in refusal(lambda: ci.forward(poisoned, [[5, 7]]))


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "path",
    [5, b"model", ["model"], "mod\0el", "mod\ud800el", "m" * 5000, ""],
    ids=["int", "bytes", "list", "NUL", "bad", "long", "empty"],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda path, here: ci.load(path),
        lambda path, here: ci.convert(path, here / "native"),
        lambda path, here: ci.convert(here, path),
        lambda path, here: train(path, [here / "text.txt"], tiny()),
        lambda path, here: train(here / "run", [path], tiny()),
    ],
    ids=["load", "convert from", "convert to", "train in", "train on"],
)
def test_paths(tmp_path, call, path):
    write_hub(tmp_path, OPT, hub_tensors(OPT))
    write_text(tmp_path / "text.txt")
    before = contents(tmp_path)
    refusal(lambda: call(path, tmp_path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("use", [ci.load, lambda model: ci.convert(model, model.with_name("native"))])
@pytest.mark.parametrize("closed", ["hub", "model.safetensors"])
def test_what_may_not_be_read(tmp_path, monkeypatch, use, closed):
    """As the system answers other users than root."""
    write_hub(tmp_path / "hub", OPT, hub_tensors(OPT))
    opened = os.open

    def denied(path, *rest, **named):
        if Path(path).name == closed:
            raise PermissionError(errno.EACCES, "permission denied", path)
        return opened(path, *rest, **named)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != closed)
    monkeypatch.setattr(os, "open", denied)
    message = refusal(lambda: use(tmp_path / "hub"))
    assert f"{closed}: permission denied; make" in message


def test_an_end_outside_the_vocabulary(tmp_path):
    write_hub(tmp_path, OPT, hub_tensors(OPT))
    written(tmp_path / "generation_config.json", json.dumps({"eos_token_id": [2, V]}))
    assert f"generation_config.json: eos_token_id {V} is outside the vocabulary" in refusal(lambda: ci.load(tmp_path))


@pytest.mark.parametrize("name", ["opt", "llama"])
@pytest.mark.parametrize("text", [5, None, b"bytes", ["list"], "a\ud800b"], ids=repr)
def test_text_for_a_tokenizer(name, text):
    _, tokenizer = ci.load(f"embedded:{name}")
    assert "text=" in refusal(lambda: tokenizer.encode(text))


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_ids_that_are_no_tokens_decode_to_nothing(name):
    _, tokenizer = ci.load(f"embedded:{name}")
    ids = tokenizer.encode("The king")
    assert tokenizer.decode([-1, *ids, 10**12, 10**6]) == tokenizer.decode(ids)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in `folder`, hidden files too."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


DIGITS = 10**400


@table(
    {
        "more layers than tensors": ({"num_hidden_layers": 10**9}, "cannot fill 1000000000 layers"),
        "layers without end": ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000"),
        "a vocabulary without end": ({"vocab_size": 10**12}, "vocab_size=1000000000000"),
        "a vocabulary that does not fit": ({"vocab_size": 2**31 - 1}, "instead of [2147483647, 32]"),
        "an MLP that does not fit": ({"intermediate_size": 10**9}, "instead of [1000000000, 32]"),
        "positions without end": ({"max_position_embeddings": DIGITS}, "max_position_embeddings=1000"),
        "an id without end": ({"eos_token_id": [2, DIGITS]}, "eos_token_id=[2, 1000"),
        "a base without end": ({"rope_theta": DIGITS}, "rope_theta=1000"),
        "a base beyond float32": ({"rope_theta": 1e300}, "rope_theta=1e+300"),
        "a factor without end": ({"rope_scaling": {"type": "linear", "factor": DIGITS}}, "without a number 'factor'"),
        "a factor NaN": ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "without a number 'factor'"),
        "an infinite epsilon": ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf"),
        "architectures in lists": ({"architectures": [["LlamaForCausalLM"]]}, "architectures=[['LlamaForCausalLM']]"),
        "architectures in objects": ({"architectures": [{"a": 1}]}, "architectures=[{'a': 1}]"),
        "a family in several lines": ({"model_type": "two\nlines"}, r"'two\nlines'"),
        "a family of a megabyte": ({"model_type": "opt" * 10**6}, "..."),
    }
)
def test_configs_that_do_not_fit_the_weights(tmp_path, mistake, named):
    hub = write_hub(tmp_path / "hub", LLAMA, hub_tensors(LLAMA))
    fields = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(fields | mistake))
    message = refusal(lambda: ci.load(hub))
    assert message.startswith(str(hub))
    assert named in message
    assert len(message) < 1500


@table(
    {
        "numbers of thousands of digits": (
            '{"model_type": "opt", "vocab_size": 1' + "0" * 5000 + "}",
            "not valid JSON",
        ),
        "nested without end": ('{"model_type": ' + "[" * 10**5 + "]" * 10**5 + "}", "not valid JSON"),
        "nested too deeply to be told": ('{"model_type": ' + "[" * 700 + "]" * 700 + "}", "model_type [[["),
    }
)
def test_json_that_no_config_is(tmp_path, mistake, named):
    hub = write_hub(tmp_path / "hub", OPT, hub_tensors(OPT))
    (hub / "config.json").write_text(mistake)
    assert named in refusal(lambda: ci.load(hub))


@pytest.mark.parametrize("name", ["two\nlines", "n" * 5000, "\N{GRINNING FACE}\r"], ids=["lines", "long", "return"])
def test_names_of_tensors_are_told_in_one_short_line(tmp_path, name):
    hub = write_hub(tmp_path / "hub", OPT, hub_tensors(OPT) | {name: np.zeros(2, np.float32)})
    message = refusal(lambda: ci.load(hub))
    assert f"unexpected {name[:2]!r}"[:-1] in message
    assert "\r" not in message
    assert len(message) < 500


def test_a_header_that_is_quoted_is_quoted_shortly(tmp_path):
    """safetensors' own message repeats the value it did not expect."""
    hub = write_hub(tmp_path / "hub", OPT, hub_tensors(OPT))
    header = json.dumps({"weight": "a" * 100_000}).encode()
    (hub / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    message = refusal(lambda: ci.load(hub))
    assert "not a readable safetensors file (" in message
    assert len(message) < 500


def test_an_index_that_names_impossible_files(tmp_path):
    hub = write_hub(tmp_path / "hub", OPT, hub_tensors(OPT), shards=2)
    names = ["n" * 5000, "", "..", "nul\0", 5, None]
    (hub / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))
    assert "named in model.safetensors.index.json; download them" in refusal(lambda: ci.load(hub))


@table(
    {
        "a size of text": ({"vocab_size": "101"}, "vocab_size='101'"),
        "layers without end": ({"num_layers": 10**9}, "cannot fill 1000000000 layers"),
        "no heads": ({"num_heads": 0}, "num_attention_heads=0"),
        "heads of another size": ({"head_size": 16}, "contradict"),
        "an unknown field": ({"two\nlines": 1}, "two"),
        "an unknown family": ({"family": "gpt2"}, "not a model's"),
        "an activation of another family": ({"activation": "silu"}, "activation_function='silu'"),
        "no positions": ({"rope": {"theta": 1e4}}, "contradict"),
        "a negative epsilon": ({"norm_eps": -1.0}, "contradict"),
        "ids that are none": ({"eos_ids": ["</s>"]}, "eos_token_id"),
        "a switch of text": ({"tied": "yes"}, "tie_word_embeddings='yes'"),
    }
)
def test_manifests_no_conversion_wrote(tmp_path, mistake, named):
    native = ci.convert(write_hub(tmp_path / "hub", OPT, hub_tensors(OPT)), tmp_path / "native")
    manifest = json.loads((native / "coreinfer.json").read_text())
    manifest["config"] |= mistake
    (native / "coreinfer.json").write_text(json.dumps(manifest))
    message = refusal(lambda: ci.load(native))
    assert message.startswith(str(native))
    assert named in message


def test_what_killed_conversions_leave_is_removed_and_what_runs_is_left_alone(tmp_path):
    hub = write_hub(tmp_path / "hub", OPT, hub_tensors(OPT))
    dead, other = tmp_path / ".native.partial-dead", tmp_path / ".native2.partial-dead"
    for folder in (dead, other):
        folder.mkdir()
        (folder / "weights-00001-of-00002.safetensors").write_text("half")
    with new_directory(tmp_path / "native") as alive:
        (alive / "mine").write_text("being written")
        native = ci.convert(hub, tmp_path / "native")
        assert alive.is_dir()
        assert other.is_dir()
        assert not dead.exists()
        native.rename(tmp_path / "elsewhere")
    assert (tmp_path / "native" / "mine").is_file()


# ---------------------------------------------------------------------------- training


def tiny(**changes: object) -> Recipe:
    sizes = {"vocab_size": 280, "hidden_size": 8, "mlp_size": 16, "num_layers": 1, "num_heads": 2}
    return Recipe(**({"family": "opt", "sequence": 16, "batch": 2, "steps": 4, "warmup": 1} | sizes | changes))


@table(
    {
        "an unknown family": ({"family": "gpt2"}, "family='gpt2' (give opt or llama)"),
        "a family that is no name": ({"family": ["opt"]}, "family=['opt']"),
        "an unknown dtype": ({"dtype": "float16"}, "dtype='float16' (give float32 or bfloat16)"),
        "a vocabulary without all bytes": ({"vocab_size": 259}, "vocab_size=259 (give a whole number from 260 to"),
        "LLaMA's vocabulary without all bytes": ({"vocab_size": 258, "family": "llama"}, "from 259 to 65536"),
        "a vocabulary beyond uint16": ({"vocab_size": 65537}, "vocab_size=65537"),
        "a vocabulary of half an entry": ({"vocab_size": 280.5}, "vocab_size=280.5"),
        "no hidden size": ({"hidden_size": 0}, "hidden_size=0 (give a whole number from 1 to"),
        "a negative MLP": ({"mlp_size": -16}, "mlp_size=-16"),
        "layers True": ({"num_layers": True}, "num_layers=True"),
        "no heads": ({"num_heads": 0}, "num_heads=0"),
        "heads of text": ({"num_heads": "2"}, "num_heads='2'"),
        "an empty window": ({"sequence": 0}, "sequence=0"),
        "an empty batch": ({"batch": 0}, "batch=0"),
        "no steps": ({"steps": 0}, "steps=0"),
        "steps beyond int32": ({"steps": 2**31}, "steps=2147483648"),
        "steps NaN": ({"steps": float("nan")}, "steps=nan"),
        "a negative warm-up": ({"warmup": -1}, "warmup=-1 (give a whole number from 0 to"),
        "a negative seed": ({"seed": -1}, "seed=-1"),
        "a seed beyond 32 bits": ({"seed": 2**32}, "seed=4294967296"),
        "no learning rate": ({"learning_rate": 0.0}, "learning_rate=0.0 (give a finite number of at least 1e-30)"),
        "a learning rate NaN": ({"learning_rate": float("nan")}, "learning_rate=nan"),
        "an infinite learning rate": ({"learning_rate": float("inf")}, "learning_rate=inf"),
        "a learning rate of text": ({"learning_rate": "fast"}, "learning_rate='fast'"),
        "a learning rate without end": ({"learning_rate": DIGITS}, "learning_rate=1000"),
        "a negative decay": ({"weight_decay": -0.1}, "weight_decay=-0.1 (give a finite number of at least 0)"),
        "a decay NaN": ({"weight_decay": float("nan")}, "weight_decay=nan"),
        "a learning rate that float32 lacks": ({"learning_rate": 1e-50}, "learning_rate=1e-50"),
        "gradients cut to what float32 lacks": ({"clip": 1e-46}, "clip=1e-46"),
        "gradients cut to nothing": ({"clip": 0}, "clip=0"),
        "clip None": ({"clip": None}, "clip=None"),
        "heads that do not divide": (
            {"hidden_size": 32, "num_heads": 3},
            "hidden_size=32 is not a multiple of num_heads=3",
        ),
        "odd heads of LLaMA": ({"family": "llama", "hidden_size": 6}, "hidden_size=6 / num_heads=2 is odd"),
        "warm-up to the end": ({"warmup": 4}, "warmup=4 leaves none of steps=4"),
        "too many weights": ({"hidden_size": 2**20}, "weights (this trains small models"),
        "too many tokens a step": ({"batch": 2**20}, "exceed 1048576 tokens a step"),
    }
)
def test_recipes(mistake, named):
    message = refusal(lambda: tiny(**mistake))
    assert message.startswith("recipe: ")
    assert named in message


def test_everything_wrong_with_a_recipe_is_told_at_once():
    message = refusal(lambda: tiny(family="gpt2", steps=0, clip=-1))
    assert all(named in message for named in ("family='gpt2'", "steps=0", "clip=-1"))


def test_the_smallest_recipes_are_no_mistake():
    assert tiny(warmup=0, steps=1, weight_decay=0, seed=2**32 - 1, vocab_size=260, num_heads=8).num_heads == 8
    assert tiny(family="llama", vocab_size=65536, learning_rate=1).vocab_size == 2**16


def write_text(path: Path, documents: int = 40) -> Path:
    told = (f"tale {i}: the cat sat on the mat and counted {i * i} mice\n<|endoftext|>\n" for i in range(documents))
    path.write_text("".join(told))
    return path


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@table(
    {
        "no such text": (lambda here: train(here / "run", [here / "absent.txt"], tiny()), "absent.txt: No such file"),
        "a folder": (lambda here: train(here / "run", [here], tiny()), "Is a directory; name a text file"),
        "bytes": (
            lambda here: train(here / "run", [here / "bytes"], tiny()),
            "not UTF-8 text (invalid start byte at byte",
        ),
        "bytes that are UTF-8": (lambda here: train(here / "run", [here / "nul"], tiny()), "NUL at character 5"),
        "an empty text": (lambda here: train(here / "run", [here / "empty"], tiny()), "0 document(s); at least two"),
        "one document": (lambda here: train(here / "run", [here / "one"], tiny()), "1 document(s); at least two"),
        "too short for its vocabulary": (
            lambda here: train(here / "run", [here / "two"], tiny()),
            "yields 261 entries",
        ),
        "too short for a window": (
            lambda here: train(here / "run", [here / "two"], tiny(vocab_size=260)),
            "two/train: 4 tokens do not fill one window of 16",
        ),
        "a window longer than the text": (
            lambda here: train(here / "run", [here / "text.txt"], tiny(sequence=5000)),
            "do not fill one window of 5000",
        ),
        "held out less than a window": (
            lambda here: train(here / "run", [here / "text.txt"], tiny(sequence=200)),
            "text.txt/held_out: ",
        ),
        "a vocabulary beyond the text": (
            lambda here: train(here / "run", [here / "text.txt"], tiny(vocab_size=65536)),
            "vocab_size=65536: this text yields",
        ),
        "LLaMA's vocabulary beyond the text": (
            lambda here: train(here / "run", [here / "text.txt"], tiny(family="llama", vocab_size=65536)),
            "vocab_size=65536: no such tokenizer from this text",
        ),
        "LLaMA's vocabulary without the text's letters": (
            lambda here: train(here / "run", [here / "text.txt"], tiny(family="llama", vocab_size=259)),
            "vocab_size=259: no such tokenizer from this text",
        ),
        "no texts": (lambda here: train(here / "run", [], tiny()), "texts: none"),
        "one path": (lambda here: train(here / "run", str(here / "text.txt"), tiny()), "give a list of text files"),
        "a path object": (lambda here: train(here / "run", here / "text.txt", tiny()), "give a list of text files"),
        "texts None": (lambda here: train(here / "run", None, tiny()), "texts=None"),
        "the same text twice": (lambda here: train(here / "run", [here / "text.txt"] * 2, tiny()), "different names"),
        "two texts of one name": (
            lambda here: train(here / "run", [here / "text.txt", here / "folder" / "text.txt"], tiny()),
            "text.txt, text.txt; give text files of different names",
        ),
        "no recipe": (lambda here: train(here / "run", [here / "text.txt"], None), "recipe=None"),
        "a recipe of fields": (lambda here: train(here / "run", [here / "text.txt"], {"family": "opt"}), "recipe={"),
        "a run that is a file": (lambda here: train(here / "one", [here / "text.txt"], tiny()), "one: exists already"),
        "a run that is another folder": (
            lambda here: train(here / "folder", [here / "text.txt"], tiny()),
            "folder: exists and is no training run; name a new directory",
        ),
        "a run in no folder": (lambda here: train(here / "no" / "run", [here / "text.txt"], tiny()), "create it first"),
    }
)
def test_training_texts(tmp_path, mistake, named):
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "text.txt")
    write_text(tmp_path / "folder" / "text.txt")
    written(tmp_path / "bytes", b"a\n<|endoftext|>\n\xff\xfe")
    written(tmp_path / "nul", "text\n\0\n<|endoftext|>\nmore")
    written(tmp_path / "empty", "")
    written(tmp_path / "one", "a document\n<|endoftext|>\n")
    written(tmp_path / "two", "a b\n<|endoftext|>\nc d")
    before = contents(tmp_path)
    assert named in refusal(lambda: mistake(tmp_path))
    assert contents(tmp_path) == before


@pytest.fixture
def begun(tmp_path, monkeypatch) -> Path:
    """A run that has taken its first step: its directory, beside its text."""
    here = tmp_path / "here"
    here.mkdir()
    write_text(here / "text.txt")
    monkeypatch.setattr(trainer, "_continue", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(here / "run", [here / "text.txt"], tiny())
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "train_step", lambda *arguments: pytest.fail("a step was taken"))
    save_state(here / "run" / CHECKPOINT, blank_state(tiny()), History([5.5], [], 1.0))
    return here / "run"


HISTORY = {"losses": [5.5], "records": [], "seconds": 1.0}


def blank_state(recipe: Recipe) -> TrainState:
    """A state of zeros after one step."""
    shapes = jax.eval_shape(lambda: initial_state(recipe, initial_params(model_config(recipe), 0)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return zeros.replace(step=np.int32(1))


def edited(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def history_of(folder: Path, metadata: dict[str, str] | None) -> None:
    save_file(load_file(folder / CHECKPOINT), folder / CHECKPOINT, metadata)


@table(
    {
        "no settings": (lambda folder: (folder / "settings.json").unlink(), "exists and is no training run"),
        "settings cut": (lambda folder: cut(written(folder / "settings.json", "{}")), "settings.json: not valid JSON"),
        "settings that are a list": (lambda folder: written(folder / "settings.json", "[]"), "holds a JSON list"),
        "settings without a recipe": (
            lambda folder: edited(folder / "settings.json", recipe=5),
            "other settings (recipe)",
        ),
        "other texts": (
            lambda folder: written(folder.parent / "text.txt", "a\n<|endoftext|>\nb"),
            "other settings (texts)",
        ),
        "no tokens": (lambda folder: (folder / TOKENS).unlink(), "tokens.safetensors: cannot be read"),
        "tokens cut": (lambda folder: cut(folder / TOKENS), "tokens.safetensors: cannot be read"),
        "tokens of other texts": (
            lambda folder: save_file({"other.txt/train": np.zeros(99, np.uint16)}, folder / TOKENS),
            "tokens.safetensors: cannot be read ('text.txt/train')",
        ),
        "tokens beyond the vocabulary": (
            lambda folder: save_file(
                {f"text.txt/{part}": np.full(99, 280, np.uint16) for part in ("train", "held_out")},
                folder / TOKENS,
            ),
            "text.txt/train are not this run's tokens",
        ),
        "too few tokens": (
            lambda folder: save_file(
                {f"text.txt/{part}": np.zeros(9, np.uint16) for part in ("train", "held_out")}, folder / TOKENS
            ),
            "text.txt/train are not this run's tokens",
        ),
        "a checkpoint cut": (lambda folder: cut(folder / CHECKPOINT), "not a checkpoint of this run"),
        "an empty checkpoint": (
            lambda folder: written(folder / CHECKPOINT, ""),
            "not a checkpoint of this run",
        ),
        "another file for a checkpoint": (
            lambda folder: written(folder / CHECKPOINT, "no weights at all" * 99),
            "not a checkpoint of this run",
        ),
        "another model's checkpoint": (
            lambda folder: save_state(folder / CHECKPOINT, blank_state(tiny(mlp_size=24)), History([5.5], [], 1.0)),
            "mlp.up.weight is float32 [24, 8]",
        ),
        "a checkpoint without some weights": (
            lambda folder: save_file({".step": np.array(1, np.int32)}, folder / CHECKPOINT, {"history": "{}"}),
            "is missing",
        ),
        "a checkpoint without its history": (lambda folder: history_of(folder, None), "not a checkpoint of this run"),
        "a history of other fields": (
            lambda folder: history_of(folder, {"history": "{}"}),
            "not a checkpoint of this run",
        ),
        "a history that is no JSON": (
            lambda folder: history_of(folder, {"history": "{"}),
            "not a checkpoint of this run",
        ),
        "a history of text": (
            lambda folder: history_of(folder, {"history": json.dumps(HISTORY | {"losses": ["5.5"]})}),
            "not a checkpoint of this run",
        ),
        "a history of other records": (
            lambda folder: history_of(folder, {"history": json.dumps(HISTORY | {"records": [{}]})}),
            "not a checkpoint of this run",
        ),
        "a history of other steps": (
            lambda folder: history_of(folder, {"history": json.dumps(HISTORY | {"losses": [5.5, 5.4]})}),
            "2 losses after 1 steps",
        ),
    }
)
def test_damaged_runs_are_not_continued(begun, mistake, named):
    mistake(begun)
    before = contents(begun.parent)
    message = refusal(lambda: train(begun, [begun.parent / "text.txt"], tiny()))
    assert message.startswith(str(begun))
    assert named in message
    assert contents(begun.parent) == before


@table(
    {
        "another size": ({"mlp_size": 24}, "mlp_size 16 -> 24"),
        "another rate": ({"learning_rate": 1e-3}, "learning_rate 0.005 -> 0.001"),
        "another family": ({"family": "llama"}, "family 'opt' -> 'llama'"),
        "more steps": ({"steps": 5}, "steps 4 -> 5"),
        "two at once": ({"steps": 5, "seed": 7}, "seed 0 -> 7"),
    }
)
def test_runs_are_not_continued_with_other_settings(begun, mistake, named):
    before = contents(begun)
    assert named in refusal(lambda: train(begun, [begun.parent / "text.txt"], tiny(**mistake)))
    assert contents(begun) == before


def test_other_texts_are_told_beside_other_settings(begun):
    written(begun.parent / "text.txt", "a\n<|endoftext|>\nb")
    message = refusal(lambda: train(begun, [begun.parent / "text.txt"], tiny(steps=5)))
    assert "other settings (texts, steps 4 -> 5)" in message


def test_texts_in_another_order_are_another_run(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_continue", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    texts = [begun.parent / "text.txt", write_text(tmp_path / "more.txt")]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", texts, tiny())
    assert "other settings (texts)" in refusal(lambda: train(tmp_path / "run", texts[::-1], tiny()))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the sizes that `tiny` trains, with its tokenizer, as a run leaves it before its first step."""
    here = tmp_path_factory.mktemp("small")
    write_text(here / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_continue", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(here / "run", [here / "text.txt"], tiny())
    write_hugging_face(here / "run", initial_params(model_config(tiny()), 0), np.dtype(np.float32))
    return here / "run"


@table(
    {
        "not there": (lambda model: model.rename(model.with_name("gone")), "no such directory"),
        "facts that are no JSON": (
            lambda model: written(model / "training.json", "{"),
            "training.json: not valid JSON",
        ),
        "facts that are a list": (lambda model: written(model / "training.json", "[]"), "training.json: holds a JSON"),
        "a tokenizer of more entries": (
            lambda model: shutil.copyfile(ASSETS / "opt" / "tokenizer.json", model / "tokenizer.json"),
            "outside the vocabulary 0 .. ",
        ),
    }
)
def test_models_to_train_further(small, tmp_path, mistake, named):
    model = tmp_path / "model"
    shutil.copytree(small, model)
    mistake(model)
    message = refusal(lambda: train(tmp_path / "run", [small.parent / "text.txt"], tiny(), model))
    assert named in message
    assert ".partial" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(begun, monkeypatch, failure):
    def fail(arrays: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half of it")
        raise failure

    before = contents(begun)
    monkeypatch.setattr(checkpoints, "save_file", fail)
    message = refusal(lambda: save_state(begun / CHECKPOINT, blank_state(tiny()), History([5.0], [], 1.0)))
    assert message.startswith(f"{begun / CHECKPOINT}: cannot be written (")
    assert contents(begun) == before
