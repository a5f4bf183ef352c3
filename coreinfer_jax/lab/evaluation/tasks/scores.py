"""What answers are worth: exact match and F1 over words, computed here so that nothing has to be fetched."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FINAL = re.compile(r"#### *(-?[0-9][0-9.,]*)")


def xquad(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 with the nearest of the right answers."""
    answers = document["answers"]
    return {
        "exact_match": max(float(words(results[0]) == words(answer)) for answer in answers),
        "f1": max(f1(results[0], answer) for answer in answers),
    }


def truthfulqa(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """How much nearer an answer is to a true one than to any false one, by F1, and whether it is."""
    true, false = (
        max((f1(results[0], answer) for answer in document[kind]), default=0.0) for kind in ("correct", "incorrect")
    )
    return {"f1_acc": float(true > false), "f1_diff": true - false}


def gsm8k(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the number after the first `####` is that of the worked answer; without one an answer is wrong."""
    found = final_number(results[0])
    return {"exact_match": float(found is not None and found == final_number(document["answer"]))}


def final_number(answer: str) -> str | None:
    """The number after `####`, without commas and a full stop at its end."""
    match = _FINAL.search(answer)
    return None if match is None else match[1].replace(",", "").rstrip(".")


def f1(answer: str, truth: str) -> float:
    """Harmonic mean of the shares of words that two texts have in common; 1 where both have none."""
    own, true = Counter(words(answer)), Counter(words(truth))
    if not own or not true:
        return float(own == true)
    return 2 * (own & true).total() / (own.total() + true.total())


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and articles, as SQuAD compares answers."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
