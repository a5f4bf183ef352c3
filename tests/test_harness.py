"""The package as a model of lm-evaluation-harness, against the harness's own class for transformers; tasks."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import coreinfer_jax as ci
from coreinfer_jax.cli import main
from coreinfer_jax.io.export import write_hugging_face
from coreinfer_jax.lab.evaluation.harness import CoreInferLM, cut_before, wanted_of
from coreinfer_jax.lab.evaluation.tasks import readers, scores
from coreinfer_jax.lab.evaluation.tasks.suite import LOCAL, Tasks
from coreinfer_jax.text import TOKENIZER_FILES
from tests.stand_ins import shallow_model
from tests.support import LLAMA, OPT, random_model

# Lm-evaluation-harness takes long to read its tasks.
pytestmark = pytest.mark.slow

CORE = ci.CoreConfig(beta=0.4)
TALE = "Once upon a time there was a king who had three sons, and the youngest of them was called a fool. "

PAIRS = [
    ("Once upon a time there was a", " king who had a daughter."),
    ("The old woman said", " nothing at all"),
    ("", "Once upon a time"),
    ("The trailing space ", "moves over"),
    (TALE * 35, " Then he went into the forest."),  # longer than the model's positions
    (TALE, TALE * 2),
]
UNTIL = {"until": ["\n", " the"], "max_gen_toks": 24, "do_sample": False}
ROLLING = ["The king.", TALE * 3, TALE * 25]

load = cache(ci.load)


@pytest.fixture(scope="module", autouse=True)
def one_index():
    """Reading the descriptions of all published tasks takes seconds: every list of them is made once."""
    made = {}

    def manager(**asked):
        key = json.dumps(asked, sort_keys=True)
        made[key] = made.get(key) or TaskManager(**asked)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coreinfer_jax.lab.evaluation.tasks.suite.TaskManager", manager)
        yield


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=own, idx=i) for i, own in enumerate(arguments)]


def ours(model=None, core=None, **settings):
    """The cut-down embedded OPT model, or that of a directory."""
    return CoreInferLM(*(load(model, "float32") if model else shallow_model("opt")), core, **settings)


@pytest.fixture(scope="module", params=["opt", "llama"])
def model(request, shallow, tmp_path_factory):
    """Directories of an OPT and a LLaMA model, with a tokenizer that transformers reads as this package does."""
    if request.param == "opt":
        return str(shallow["opt"])
    directory = tmp_path_factory.mktemp("llama")
    config = shallow_model("opt")[0].config
    ids = {name: getattr(config, name) for name in ("vocab_size", "max_positions", "bos_id", "eos_ids", "pad_id")}
    write_hugging_face(directory, random_model(replace(LLAMA, **ids)), np.dtype("float32"))
    for name in TOKENIZER_FILES:
        if (shallow["opt"] / name).is_file():
            shutil.copyfile(shallow["opt"] / name, directory / name)
    return str(directory)


@pytest.fixture(scope="module")
def theirs(model):
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=1)


@pytest.mark.torch
def test_all_neurons_score_as_transformers_does(model, theirs):
    asked = requests("loglikelihood", *PAIRS)
    for (logprob, best), (expected, expected_best) in zip(
        ours(model, batch_size=4).loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert best == expected_best


@pytest.mark.torch
def test_all_neurons_roll_as_transformers_does(model, theirs):
    asked = requests("loglikelihood_rolling", *((text,) for text in ROLLING))
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    np.testing.assert_allclose(ours(model).loglikelihood_rolling(asked), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.torch
def test_all_neurons_generate_what_transformers_does(model, theirs):
    longest = {"until": [], "max_gen_toks": 40}
    asked = requests("generate_until", *((TALE, settings) for settings in (UNTIL, longest)), ("The wolf", UNTIL))
    found = ours(model, batch_size=2).generate_until(asked)
    assert found == theirs.generate_until(asked, disable_tqdm=True)
    assert "\n" not in found[0] + found[2]
    assert " the" not in found[0] + found[2]


@pytest.mark.torch
def test_texts_are_encoded_as_the_harness_does(model, theirs):
    bos = theirs.tokenizer.bos_token
    for text in ("The king", f"{bos}The king", ""):
        for special in (None, True, False):
            assert ours(model).tok_encode(text, special) == theirs.tok_encode(text, special)
    assert ours(model).eot_token_id == theirs.eot_token_id
    assert ours(model).prefix_token_id == theirs.prefix_token_id
    assert ours(model).max_length == theirs.max_length


def test_a_continuation_is_scored_on_core_neurons_of_its_context():
    params, tokenizer = shallow_model("opt")
    found = ours(core=CORE, batch_size=4).loglikelihood(requests("loglikelihood", *PAIRS))
    context, continuation = PAIRS[0]
    ids = tokenizer.encode(context)
    rest = tokenizer.encode(context + continuation)[len(ids) :]
    core = ci.generate(params, [ids], CORE, max_new_tokens=1).core
    expected = ci.score_continuations(params, [ids], [rest], core)
    assert found[0][0] == pytest.approx(float(expected.logprobs[0].sum()), abs=1e-3)
    dense = ours().loglikelihood(requests("loglikelihood", *PAIRS))
    assert all(abs(own - full) > 1e-3 for (own, _), (full, _) in zip(found, dense, strict=True))


@pytest.mark.parametrize("core", [None, CORE], ids=["dense", "core"])
def test_batches_change_nothing_and_order_is_kept(core):
    generation = [(text, UNTIL) for text, _ in PAIRS]
    one, many = (ours(core=core, batch_size=size) for size in (1, 4))
    for kind, arguments in {
        "loglikelihood": PAIRS,
        "loglikelihood_rolling": [(text,) for text in ROLLING],
        "generate_until": generation,
    }.items():
        alone, together = (getattr(lm, kind)(requests(kind, *arguments)) for lm in (one, many))
        if kind == "generate_until":
            assert together == alone
        else:
            np.testing.assert_allclose(
                np.array(together, np.float64), np.array(alone, np.float64), rtol=1e-5, atol=1e-3
            )


def test_contexts_that_were_too_long_are_counted():
    lm = ours(batch_size=2)
    lm.loglikelihood(requests("loglikelihood", *PAIRS))
    assert lm.truncated == 1
    lm.generate_until(requests("generate_until", (TALE, UNTIL), (TALE * 35, UNTIL)))
    assert lm.truncated == 2


def test_generated_text_is_that_of_generate():
    params, tokenizer = shallow_model("opt")
    prompt = tokenizer.encode(TALE)
    out = ci.generate(params, [prompt], CORE, max_new_tokens=40, eos_ids=params.config.eos_ids)
    whole = tokenizer.decode(out.tokens[0, : out.lengths[0]])
    stop = whole[20:26]
    asked = [(TALE, {"until": until, "max_gen_toks": 40}) for until in ([], [stop], stop, ["never said", stop])]
    expected = whole[: whole.index(stop)]
    assert ours(core=CORE).generate_until(requests("generate_until", *asked)) == [whole, *[expected] * 3]


class Marking:
    """A tokenizer with one more name for a special token."""

    def __init__(self, tokenizer, token):
        self.encode, self.decode, self.special_id = tokenizer.encode, tokenizer.decode, {"<stop>": token}.get


def test_a_special_token_ends_a_text():
    params, tokenizer = shallow_model("opt")
    made = ci.generate(params, [tokenizer.encode(TALE)], None, max_new_tokens=20).tokens[0].tolist()
    lm = CoreInferLM(params, Marking(tokenizer, made[12]), None)
    asked = requests("generate_until", (TALE, {"until": ["<stop>"], "max_gen_toks": 20}))
    assert lm.generate_until(asked) == [tokenizer.decode(made[: made.index(made[12])])]


def test_first_windows_are_half_the_full_models():
    lm = ours(core=CORE)
    tokens = list(range(10, 40))
    ((first,), (rest,)) = lm._windows(tokens)
    assert first == ([lm.prefix_token_id], tokens[:15])
    assert rest == ([lm.prefix_token_id, *tokens[:15]], tokens[15:])
    long = [7] * (lm.max_length + 500)
    dense, narrowed = lm._windows(long)
    assert [len(followed) for _, followed in dense] == [64]
    assert sum(len(followed) for _, followed in narrowed) == len(long) - 64
    assert all(len(context) >= 64 and len(context) + len(rest) <= lm.max_length + 1 for context, rest in narrowed)


def test_rolling_sums_what_its_parts_are_worth():
    params, tokenizer = shallow_model("opt")
    ids, bos = tokenizer.encode(TALE * 2), params.config.bos_id
    half = (len(ids) + 1) // 2
    assert half < 64
    dense = ci.score_continuations(params, [[bos]], [ids[:half]], None).logprobs[0].sum()
    narrowed = ci.score_continuations(params, [[bos, *ids[:half]]], [ids[half:]], CORE).logprobs[0].sum()
    (found,) = ours(core=CORE).loglikelihood_rolling(requests("loglikelihood_rolling", (TALE * 2,)))
    assert found == pytest.approx(float(dense + narrowed), abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "sampling"),
    [
        ({}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}),
        ({"temperature": 0.7}, {"temperature": 0.7, "top_k": None, "top_p": None}),
        ({"do_sample": True, "top_k": 5}, {"temperature": 1.0, "top_k": 5, "top_p": None}),
        ({"do_sample": True, "temperature": 0.0}, {"temperature": 0.0}),
    ],
)
def test_generation_settings(settings, sampling):
    wanted = wanted_of({"until": "\n", "max_new_tokens": 9, **settings})
    assert (wanted.until, wanted.new_tokens, wanted.sampling) == (("\n",), 9, sampling)


def test_drawn_texts_depend_on_the_seed():
    asked = requests("generate_until", (TALE, {"until": [], "max_gen_toks": 20, "temperature": 1.5, "top_k": 50}))
    first, again, other = (ours(seed=seed).generate_until(asked) for seed in (1, 1, 2))
    assert first == again != other


def test_texts_are_cut_before_the_first_stop():
    assert cut_before("one, two. three", [".", ","]) == ("one", True)
    assert cut_before("one", ["", "two"]) == ("one", False)


class Chatty:
    """A tokenizer of characters with a chat template."""

    has_chat_template = True

    def encode(self, text):
        return [3 + ord(c) % 90 for c in text]

    def render_chat(self, messages, begin_answer):
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + ("[assistant]" if begin_answer else "")


def test_chat_templates_are_applied():
    lm = CoreInferLM(random_model(OPT), Chatty(), name="some/model")
    talk = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(talk) == "[user]hi[assistant]"
    assert lm.apply_chat_template(talk, add_generation_prompt=False) == "[user]hi"
    assert lm.tokenizer_name == lm.chat_template(True) == "some__model"
    assert lm.chat_template(False) == ""
    with pytest.raises(ci.CoreInferError, match="has no chat template"):
        ours().apply_chat_template(talk)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ours(batch_size=0), "batch_size=0"),
        (lambda: ours(core=ci.CoreConfig(per_row=False)), "per_row=False"),
        (lambda: wanted_of({"num_beams": 4}), "num_beams=4: is not implemented"),
        (lambda: ours().generate_until(requests("generate_until", ("a", {"max_gen_toks": 1024}))), "leaves no room"),
        (lambda: ours().loglikelihood(requests("loglikelihood", ("a", ""))), "a continuation of 0 tokens"),
        (lambda: ours().loglikelihood(requests("loglikelihood", ("a", TALE * 90))), "a continuation of"),
        (lambda: Tasks(["no_such_task_at_all"]), "task 'no_such_task_at_all'"),
    ],
)
def test_mistakes_are_refused(call, said):
    with pytest.raises(ci.CoreInferError, match=said):
        call()


# Words as SQuAD compares them, and shares of them by hand.
@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [("The cat.", "a cat", 1.0), ("cat dog", "cat", 2 / 3), ("dog", "cat", 0.0), ("", "cat", 0.0), ("the", "a", 1.0)],
)
def test_f1(answer, truth, expected):
    assert scores.f1(answer, truth) == pytest.approx(expected)


def test_scores_of_documents():
    asked = {"answers": ["the North Sea", "a sea"]}
    assert scores.xquad(asked, [" North sea. "]) == {"exact_match": 1.0, "f1": 1.0}
    assert scores.xquad(asked, ["cold north sea"]) == {"exact_match": 0.0, "f1": pytest.approx(0.8)}
    asked = {"correct": ["Nothing happens"], "incorrect": ["You die", "You grow"]}
    assert scores.truthfulqa(asked, ["nothing"]) == {"f1_acc": 1.0, "f1_diff": pytest.approx(2 / 3)}
    assert scores.truthfulqa(asked, ["you"]) == {"f1_acc": 0.0, "f1_diff": pytest.approx(-2 / 3)}


@pytest.mark.parametrize(
    ("said", "number"),
    [("so 5.\n#### 1,234.", "1234"), ("#### -7", "-7"), ("####3.5 apples", "3.5"), ("the answer is 18", None)],
)
def test_final_numbers_are_read_strictly(said, number):
    assert scores.final_number(said) == number
    assert scores.gsm8k({"answer": "Work.\n#### 18"}, ["That is #### 18"]) == {"exact_match": 1.0}
    assert scores.gsm8k({"answer": "Work.\n#### 18"}, ["That is 18"]) == {"exact_match": 0.0}


STORIES = [" ".join(f"s{i}w{j}" for j in range(70 + i)) for i in range(6)]


def test_true_endings_go_on_and_stand_at_each_place(tmp_path):
    write_stories(tmp_path)
    documents = readers.story_cloze([str(tmp_path)])["test"]
    assert len(documents) == 6
    for i, document in enumerate(documents):
        words = STORIES[i].split(" ")
        assert document["beginning"] == " ".join(words[:48])
        assert document["label"] == i % 4
        assert document["endings"][i % 4] == " " + " ".join(words[48:64])
        assert len({ending.split("w")[0] for ending in document["endings"]}) == 4


def write_stories(directory):
    (directory / "stories.txt").write_text("\n".join([*STORIES, "too short"]))


def write_questions(directory):
    article = {
        "paragraphs": [
            {"context": "The sea is cold.", "qas": [{"question": "What is cold?", "answers": [{"text": "the sea"}]}]}
        ]
    }
    (directory / "xquad.en.json").write_text(json.dumps({"data": [article] * 4}))
    lines = [json.dumps({"question": f"What is {i} + 1?", "answer": f"So\n#### {i + 1}"}) for i in range(10)]
    (directory / "gsm8k_test.jsonl").write_text("\n".join(lines))
    with (directory / "TruthfulQA.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Type", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        table.writerows([["a", f"Who, {i}?", "Nobody", "Nobody; No one", "You; Me"] for i in range(10)])


def test_tasks_run_dense_and_narrowed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_stories(tmp_path)
    write_questions(tmp_path)
    sizes = ["--limit", "2", "--batch-size", "2", "--beta", "0.3", "0.6", "--num-fewshot", "1"]
    arguments = ["eval", "--tasks", *LOCAL, "--task-data", str(tmp_path), *sizes]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["tasks"]) == set(LOCAL)
    assert all(own["documents"] == 2 and own["num_fewshot"] == 1 for own in found["tasks"].values())
    assert [own["core"] and own["core"]["beta"] for own in found["settings"]] == [None, 0.3, 0.6]
    assert (found["model"], found["limit"], found["num_fewshot"]) == ("embedded:opt", 2, 1)
    for own in found["settings"]:
        assert own["truncated"] == 0
        assert set(own["scores"]["local_story_cloze"]) == {"acc", "acc_norm"}
        assert all(
            "value" in metric and "stderr" in metric for task in own["scores"].values() for metric in task.values()
        )


def test_a_table_has_a_column_per_keep_ratio(shallow, tmp_path, capsys):
    write_stories(tmp_path)
    arguments = [
        "eval",
        "--model",
        str(shallow["opt"]),
        "--tasks",
        "local_story_cloze",
        "--task-data",
        str(tmp_path),
        "--limit",
        "1",
    ]
    assert main([*arguments, "--batch-size", "2", "--beta", "0.3", "0.6"]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["task", "shots", "documents", "metric", "all", "neurons", "keep", "0.3", "keep", "0.6"]
    assert [line[:4] for line in table[1:]] == [["local_story_cloze", "0", "1", name] for name in ("acc", "acc_norm")]


def test_accuracy_is_that_of_scores_by_hand(shallow, tmp_path, capsys):
    write_stories(tmp_path)
    arguments = ["--model", str(shallow["opt"]), "--tasks", "local_story_cloze", "--task-data", str(tmp_path)]
    assert main(["eval", *arguments, "--beta", "0.4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    params, tokenizer = shallow_model("opt")
    right = {"None": [], "core": []}
    for document in readers.story_cloze([str(tmp_path)])["test"]:
        ids = tokenizer.encode(document["beginning"])
        rest = [tokenizer.encode(document["beginning"] + ending)[len(ids) :] for ending in document["endings"]]
        for name, core in (("None", None), ("core", CORE)):
            own = ci.score_continuations(params, [ids] * 4, rest, core).logprobs
            right[name].append(int(np.argmax([row.sum() for row in own])) == document["label"])
    for name, setting in zip(right, found["settings"], strict=True):
        assert setting["scores"]["local_story_cloze"]["acc"]["value"] == pytest.approx(np.mean(right[name]))


def test_the_files_beside_the_project_are_read(real_data):
    directories = [str(real_data / "tasks"), str(real_data / "text")]
    sizes = {name: len(getattr(readers, name)(directories)["test"]) for name in ("xquad", "gsm8k", "truthfulqa")}
    assert sizes["gsm8k"] == 1319 - 8
    assert sizes["truthfulqa"] == 817 - 8
    assert 1000 < sizes["xquad"] < 1190
    assert len(readers.story_cloze(directories)["test"]) > 1000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --data FILE"),
        (["--tasks", "local_gsm8k", "--data", "a.txt"], "and not both"),
        (["--tasks", "local_gsm8k"], "gsm8k_test.jsonl: no --task-data is given"),
        (["--tasks", "local_gsm8k", "--task-data", "{here}"], "gsm8k_test.jsonl: not in"),
        (["--tasks", "local_gsm8k", "--task-data", "nowhere"], "nowhere: no such directory"),
        (["--tasks", "local_story_cloze", "--task-data", "{here}", "--limit", "0"], "limit=0"),
        (["--tasks", "local_story_cloze", "--task-data", "{here}", "--num-fewshot", "-1"], "num_fewshot=-1"),
        (["--tasks", "local_story_cloze", "--task-data", "{here}", "--batch-size", "0"], "batch_size=0"),
        (["--tasks", "local_story_cloze", "--task-data", "{here}", "--chat"], "has no chat template"),
        (["--tasks", "local_story_cloze", "--texts", "5"], "--texts: only says something of --data"),
        (["--tasks", "local_story_clozes"], "did you mean local_story_cloze"),
        (["--tasks", "local_story_cloze", "--task-data", "{here}", "--beta", "2"], "beta=2"),
        (["--data", "a.txt", "--limit", "5"], "--limit: only says something of --tasks"),
        (["--tasks", "hellaswag"], "task 'hellaswag': its data cannot be had"),
    ],
)
def test_mistakes_get_one_line(tmp_path, capsys, monkeypatch, arguments, said):
    write_stories(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", offline)
    assert main(["eval", *(argument.format(here=tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert said in error[-1]
    assert error[-1].startswith("coreinfer: error: ")


def offline(*_, **__):
    raise ConnectionError("no network\nhere")


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("xquad.en.json", '{"data": [{}]}', "not in the format of SQuAD"),
        ("gsm8k_test.jsonl", '{"question": "a", "answer": "b"}', "holds 1 documents"),
        ("TruthfulQA.csv", "Question\na\n", "no column 'Best Answer'"),
        ("stories.txt", "short", "0 stories have 64 words"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, file, content, said):
    (tmp_path / file).write_text(content)
    read = {"x": readers.xquad, "g": readers.gsm8k, "T": readers.truthfulqa, "s": readers.story_cloze}[file[0]]
    with pytest.raises(ci.CoreInferError, match=said):
        read([str(tmp_path)])


def test_more_examples_than_there_are_is_refused(tmp_path):
    write_questions(tmp_path)
    with pytest.raises(ci.CoreInferError, match="num_fewshot=9: local_gsm8k has 8 examples"):
        Tasks(["local_gsm8k"], [str(tmp_path)], num_fewshot=9)


def test_without_the_harness_the_extra_is_named():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "from coreinfer_jax.cli import main\n"
        "sys.exit(main(['eval', '--tasks', 'local_gsm8k']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        "coreinfer: error: tasks need lm-evaluation-harness: pip install 'coreinfer_jax[lm-eval]'"
    ]


def test_other_commands_do_not_import_the_harness():
    code = "import sys, coreinfer_jax.cli.main; sys.exit('lm_eval' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
