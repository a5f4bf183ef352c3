"""The documents of the tasks described here, out of the user's files.

lm-evaluation-harness calls these with what is known of a task; `task_data` names the directories to look in. A file's
first documents become the split `fewshot`, which lends examples, and are not asked.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.files import read_json, to_path
from coreinfer_jax.text.documents import read_documents, read_table

Document = dict[str, Any]
Splits = dict[str, Dataset]

EXAMPLES = 8
# Story cloze: words of a story that are given, words that follow, endings to choose from.
BEGINNING, ENDING, CHOICES = 48, 16, 4


def xquad(task_data: Sequence[str] = (), **_: Any) -> Splits:
    """Questions on passages, in SQuAD's format; the first article lends the examples."""
    path = _find("xquad.en.json", task_data)
    content = read_json(path)
    try:
        articles = [
            [
                {
                    "context": str(paragraph["context"]),
                    "question": str(question["question"]),
                    "answers": [str(answer["text"]) for answer in question["answers"]],
                }
                for paragraph in article["paragraphs"]
                for question in paragraph["qas"]
            ]
            for article in content["data"]
        ]
        if not all(document["answers"] for article in articles for document in article):
            raise KeyError("answers")
    except (KeyError, TypeError) as error:
        raise CoreInferError(f"{path}: not in the format of SQuAD ({error!r}); download it again") from error
    documents = [document for article in articles for document in article]
    return _splits(path, documents, len(articles[0]) if articles else 0)


def gsm8k(task_data: Sequence[str] = (), **_: Any) -> Splits:
    """Problems of arithmetic with worked answers that end in `#### NUMBER`; the first 8 lend the examples."""
    path = _find("gsm8k_test.jsonl", task_data)
    problems = read_documents(path, "question", "answer")
    pairs = zip(problems.texts, problems.labels or (), strict=True)
    return _splits(path, [{"question": question, "answer": answer} for question, answer in pairs], EXAMPLES)


def truthfulqa(task_data: Sequence[str] = (), **_: Any) -> Splits:
    """Questions that many people answer wrongly, with true and false answers; the first 8 lend the examples."""
    path = _find("TruthfulQA.csv", task_data)
    rows = read_table(path, ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
    documents = [
        {"question": question, "best": best, "correct": _listed(correct), "incorrect": _listed(incorrect)}
        for question, best, correct, incorrect in rows
    ]
    return _splits(path, documents, EXAMPLES)


def story_cloze(task_data: Sequence[str] = (), **_: Any) -> Splits:
    """48 words of a story, and four times 16 words of which one goes on; the others do so in the stories after it.

    Stories of fewer than 64 words are left out. The true ending stands at each place in turn.
    """
    path = _find("stories.txt", task_data)
    halves = [half for text in read_documents(path).texts if (half := _cut(text)) is not None]
    documents = [
        {"beginning": beginning, "endings": _turned([halves[(i + k) % len(halves)][1] for k in range(CHOICES)], i)}
        | {"label": i % CHOICES}
        for i, (beginning, _) in enumerate(halves)
    ]
    if len(documents) < CHOICES:
        raise CoreInferError(
            f"{path}: {len(documents)} stories have {BEGINNING + ENDING} words; give at least {CHOICES}"
        )
    return _splits(path, documents, 0)


def _cut(story: str) -> tuple[str, str] | None:
    """A story's beginning, and what follows with the white space before it."""
    words = [match.end() for match in re.finditer(r"\S+", story.strip())]
    if len(words) < BEGINNING + ENDING:
        return None
    middle, end = words[BEGINNING - 1], words[BEGINNING + ENDING - 1]
    return story.strip()[:middle], story.strip()[middle:end]


def _turned(endings: list[str], places: int) -> list[str]:
    """`endings` moved on by so many places, the last ones to the front."""
    first = -places % len(endings)
    return endings[first:] + endings[:first]


def _listed(answers: str) -> list[str]:
    return [answer.strip() for answer in answers.split(";") if answer.strip()]


def _find(name: str, directories: Sequence[str]) -> Path:
    found = [path for directory in directories if (path := to_path(directory) / name).is_file()]
    if not found:
        looked = f"not in {', '.join(map(str, directories))}" if directories else "no --task-data is given"
        raise CoreInferError(f"{name}: {looked}; name a directory that holds it with --task-data DIR")
    return found[0]


def _splits(path: Path, documents: list[Document], examples: int) -> Splits:
    """The first `examples` documents apart, to be shown before a question."""
    if len(documents) <= examples:
        raise CoreInferError(
            f"{path}: holds {len(documents)} documents, and the first {examples} only lend examples; give more"
        )
    asked = {"test": Dataset.from_list(documents[examples:])}
    return asked | ({"fewshot": Dataset.from_list(documents[:examples])} if examples else {})
