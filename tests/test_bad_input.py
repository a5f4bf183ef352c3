"""Every mistake a caller can make in Python is one `CoreInferError` of one line that names what is wrong."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreinfer_jax as ci
from coreinfer_jax.params import Params
from tests.support import LLAMA, OPT, random_model

V, F, L, P = OPT.vocab_size, OPT.mlp_size, OPT.num_layers, OPT.max_positions
PROMPT = [5, 6, 7]
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
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    message = refusal(lambda: ci.generate(opt(), [[5] * P], max_new_tokens=1))
    assert f"{P} prompt tokens + max_new_tokens=1 exceed the model's {P} positions" in message


@table(
    {
        "beyond the positions": (lambda: ci.forward(opt(), [[5] * (P + 1)]), f"{P + 1} tokens exceed"),
        "unequal rows": (lambda: ci.forward(opt(), [[5, 6], [5]]), "unequal lengths"),
        "too few layers": (lambda: ci.forward(opt(), [PROMPT], core(layers=2)), "2 layers"),
        "sets for other rows": (lambda: ci.forward(opt(), [PROMPT], core_rows(2)), "2 rows, but tokens have 1"),
        "a choice, not a set": (lambda: ci.forward(opt(), [PROMPT], ci.CoreConfig()), "CoreConfig"),
        "narrowed for other rows": (lambda: ci.forward(ci.compact(opt(), core_rows(2)), [PROMPT] * 3), "2 rows"),
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
        lambda params: ci.generate(params, [PROMPT]),
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


FRACTIONS = [0, 0.0, -0.1, 1.0001, 5, float("nan"), float("inf")]


@pytest.mark.parametrize("value", FRACTIONS)
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_shares(name, value):
    assert f"{name}={value}: " in refusal(lambda: ci.CoreConfig(**{name: value}))
    assert f"{name}={value}: " in refusal(lambda: ci.select_core_neurons(jnp.ones((3, 5)), **{name: value}))


@pytest.mark.parametrize("budget", ["", "median", "MEAN", None])
def test_budgets(budget):
    assert f"budget={budget!r}" in refusal(lambda: ci.CoreConfig(budget=budget))
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
    assert "logits are NaN or infinite" in refusal(lambda: ci.generate(damaged, [PROMPT], max_new_tokens=1))
    chunks = ci.stream(damaged, [PROMPT])
    assert "logits are NaN or infinite" in refusal(lambda: next(chunks))


def test_infinite_logits():
    weight = llama().unembedding
    assert weight is not None
    damaged = llama().replace(unembedding=weight.at[3].set(jnp.inf))
    assert "logits are NaN or infinite" in refusal(lambda: ci.generate(damaged, [PROMPT], max_new_tokens=1))


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
    expected = ci.generate(opt(), [PROMPT], max_new_tokens=4, temperature=1.0, key=3).tokens
    for new, same_key in ((np.int64(4), key), (4, jax.random.key_data(key)), (4, np.int64(3))):
        made = ci.generate(opt(), tokens, max_new_tokens=new, temperature=1.0, key=same_key).tokens
        np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("call", [ci.generate, ci.stream, ci.forward])
def test_what_load_returns_is_not_params_yet(call):
    assert "params: tuple" in refusal(lambda: call((opt(), None), [[5, 6]]))


def test_forward_with_nan_weights():
    poisoned = opt().replace(token_embedding=opt().token_embedding.at[7, 0].set(jnp.nan))
    assert "NaN" in refusal(lambda: ci.forward(poisoned, [[5, 7]]))
