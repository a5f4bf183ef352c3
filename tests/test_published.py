"""The comparisons of SmolLM2 with published methods: what they read, choose and count, on a small model."""

from dataclasses import replace

import numpy as np
import pytest

import coreinfer_jax as ci
from benchmarks import chat_questions, prompt_lengths, published
from benchmarks.published import COUNTED, FUSED, GLOBAL, LOCAL, OURS
from coreinfer_jax.lab.evaluation import Texts
from coreinfer_jax.lab.evaluation.comparison import bytes_per_token
from coreinfer_jax.lab.evaluation.material import prompt_halves
from coreinfer_jax.lab.evaluation.measure import collect
from coreinfer_jax.sparsity.rules import Griffin
from coreinfer_jax.text.corpus import Beginnings
from coreinfer_jax.text.documents import Documents
from tests.support import LLAMA, random_model
from tests.test_calibration import Lengths
from tests.test_linear import explained

ARTICLES = "".join(
    f" \n = Title {i} = \n \n" + " ".join("a" * (i + j) for j in range(1, 30)) + "\n\n = = Part = = \n \n more words \n"
    for i in range(1, 5)
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small():
    return explained(random_model(LLAMA))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(published, "WIKITEXT", Texts(prompt_tokens=(8,), continuation=8, texts=3))
    for name, value in {"NEW": 6, "JUDGED": 2, "LEARNT": 2, "TOP": 10, "SPARSITIES": (0.5,)}.items():
        monkeypatch.setattr(published, name, value)
    monkeypatch.setattr(published, "RULES", {name: published.RULES[name] for name in ("GRIFFIN", OURS, COUNTED)})
    monkeypatch.setattr(published, "CORES", {OURS: published.CORES[OURS]})


@pytest.fixture
def wikitext(tmp_path):
    path = tmp_path / "wikitext.txt"
    path.write_text(ARTICLES, encoding="utf-8")
    return path


def test_articles_begin_at_titles_and_not_at_headings(wikitext):
    texts = published.read_articles(wikitext).texts
    assert [text.split()[:3] for text in texts] == [["=", "Title", str(i)] for i in range(1, 5)]
    assert all("= = Part = =" in text for text in texts)


def test_both_results_are_measured_and_shown(small, quick, wikitext, monkeypatch):
    results = list(published.of_model(small, Lengths(), wikitext, published.PARTS))
    on_articles, own_text = results
    assert [own["name"] for own in on_articles["settings"]] == list(published.RULES)
    read = {own["name"]: own["bytes_per_token"] for own in on_articles["settings"]}
    F, D, L = LLAMA.mlp_size, LLAMA.hidden_size, LLAMA.num_layers
    left_out = {"GRIFFIN": 3 * (F - F // 2), COUNTED: 2 * (F - F // 4)}
    for name, rows in left_out.items():
        assert read[name] == bytes_per_token(small, published.RULES["GRIFFIN"](1.0)) - 4 * L * D * rows
    names = [own["name"] for own in own_text["settings"]]
    assert names == [LOCAL, GLOBAL, FUSED, *published.CORES]
    for own in own_text["settings"]:
        assert own["kl"]["mean"] > 0
        assert own["perplexity"]["mean"] > 1
    monkeypatch.setattr(published, "read_results", lambda name: results)
    assert f"\n| {OURS} | SmolLM2-135M | perplexity |" in published.wikitext()
    assert "| TEAL (published) | LLaMA-2-7B | perplexity | 5.07 | 5.09, x 1.00 |" in published.wikitext()
    assert "2 texts of 6 tokens" in published.own_text()
    assert published.own_text().count("\n| ") == 3 + len(names) - 1


def test_the_prompt_alone_chooses_as_griffin_does(small, quick):
    [(prompt, text), _] = published._written(small, [[5, 7, 9, 11], [4, 6, 8]] * 4, 2)
    width = len(prompt) + published.NEW + 3
    reading, following = published._read(small, prompt, text, width)
    np.testing.assert_array_equal(following[0], text[1:])
    [known] = collect(small, Beginnings.of([[3, 4, 5, 6, 7], [8, 9]]), [Griffin()]).values()
    cores = published._cores(small, prompt, reading, known)
    griffin = ci.CoreConfig(beta=published.KEEP, rule="griffin", compensation=0.0, allocation="equal")
    assert cores[LOCAL] == ci.generate(small, [prompt], griffin, max_new_tokens=1).core.row(0)
    assert cores[GLOBAL] != cores[LOCAL]
    assert any(cores[OURS].linear)
    assert not any(cores[FUSED].linear)
    # All neurons, given by hand, are the full model again.
    every = ci.CoreNeurons([np.arange(LLAMA.mlp_size)] * LLAMA.num_layers)
    rest = np.asarray([text[: published.NEW]], np.int32)
    logits = published._continued(ci.compact(small, every).weights, reading, rest)
    np.testing.assert_allclose(logits, reading.logits, rtol=1e-4, atol=1e-4)


def test_fused_ranks_keep_what_both_rank_high():
    own, others = np.array([0, 3, 1, 2, 4]), np.array([4, 0, 1, 3, 2])
    np.testing.assert_array_equal(published.lowest(own + others, 2), [1, 2])
    np.testing.assert_array_equal(published.lowest(own, 3), [0, 2, 3])
    np.testing.assert_array_equal(published.lowest(np.array([1, 1, 1]), 2), [0, 1])


def test_differences_equal_their_definitions(quick):
    full, narrowed = np.random.default_rng(0).normal(size=(2, 1, 6, 60)).astype(np.float32) * 3
    following = np.arange(6, dtype=np.int32)[None]
    found = np.asarray(published._differences(full, narrowed, following))[:, 0]
    for t in range(6):
        p, q = (np.exp(logits[0, t].astype(np.float64)) for logits in (full, narrowed))
        most = np.argsort(-p)[:10]
        expected = []
        for some in (np.arange(60), most):
            a, b = p[some] / p[some].sum(), q[some] / q[some].sum()
            expected.append((a * np.log(a / b)).sum())
        expected += [p.argmax() == q.argmax(), -np.log(q[t] / q.sum())]
        np.testing.assert_allclose(found[:, t], expected, rtol=1e-4, atol=1e-5)


def test_texts_that_end_too_early_are_refused(quick):
    ends_at_once = random_model(replace(LLAMA, eos_ids=tuple(range(LLAMA.vocab_size))))
    with pytest.raises(ci.CoreInferError, match="0 of the model's own texts have more than 6 tokens"):
        published._written(ends_at_once, [[5, 7]] * published.ROWS, 2)


def test_every_length_of_prompt_is_followed_by_the_same_text(small, monkeypatch):
    monkeypatch.setattr(prompt_lengths, "TEXTS", Texts(prompt_tokens=(4, 9), continuation=8, texts=3))
    monkeypatch.setattr(prompt_lengths, "KEEPS", (0.5,))
    read, compare_on = [], prompt_lengths.compare_on

    def compared(params, excerpts, *others):
        read.append(excerpts.rows)
        return compare_on(params, excerpts, *others)

    monkeypatch.setattr(prompt_lengths, "compare_on", compared)
    results = list(
        prompt_lengths.of_model(small, Lengths(), Documents("words", "", tuple(ARTICLES.split("Title")[1:])))
    )
    assert [result["prompt_tokens"] for result in results] == [4, 9]
    for name, short, long in zip(prompt_lengths.NAMES, *(result["settings"] for result in results), strict=True):
        assert (short["name"], long["name"]) == (name, name)
    short_rows, long_rows = read
    np.testing.assert_array_equal(short_rows[:, -8:], long_rows[:, -8:])
    monkeypatch.setattr(prompt_lengths, "read_results", lambda name: results)
    assert [line.split(" | ")[0] for line in prompt_lengths.table().splitlines()[2:4]] == ["| 4, 50%", "| 9, 50%"]


def test_questions_that_nothing_is_learnt_from_are_answered_greedily(small, monkeypatch):
    monkeypatch.setattr(chat_questions, "TEXTS", Texts(texts=5, continuation=6))
    monkeypatch.setattr(chat_questions, "KEEPS", (0.5,))
    tokenizer = Lengths(has_chat_template=True)
    found = chat_questions.answered(small, tokenizer)
    learnt, judged = prompt_halves(small, tokenizer, chat_questions.TEXTS)
    for row, prompt in zip(found.rows.tolist(), found.context.tolist(), strict=True):
        assert row[:prompt] in judged
        assert row[:prompt] not in learnt
        alone = ci.generate(small, [row[:prompt]], None, max_new_tokens=7)
        assert row[prompt : prompt + 7] == alone.tokens[0].tolist()
    result = chat_questions.of_model(small, tokenizer)
    monkeypatch.setattr(chat_questions, "read_results", lambda name: [result])
    assert [line.split(" | ")[0] for line in chat_questions.table().splitlines()[2:3]] == ["| 50%"]
    assert [own["name"] for own in result["settings"]] == list(chat_questions.NAMES)
