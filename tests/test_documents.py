"""Documents out of files, against what was written into them."""

import csv
from pathlib import Path

import pytest

import coreinfer_jax as ci
from coreinfer_jax.text.documents import read_table
from tests.test_bad_input import refusal

TEXTS = ("One.", 'He said "no", twice.', "two\u2028parts\x0cand more", "lines\nwithin", "\u00e4\u6f22")


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_a_line_each_or_separated(tmp_path: Path) -> None:
    lines = ci.read_documents(write(tmp_path / "a.txt", "one\n\n two\n"))
    assert lines.texts == ("one", " two")
    assert lines.labels is None
    separated = "one\nmore\n<|endoftext|>\n\ntwo\n<|endoftext|> \n<|endoftext|>\n"
    assert ci.read_documents(write(tmp_path / "b.txt", separated)).texts == ("one\nmore", "two")
    windows = separated.replace("\n", "\r\n")
    assert ci.read_documents(str(write(tmp_path / "c.txt", windows, "utf-8-sig"))).texts == ("one\nmore", "two")


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_are_read_as_they_were_written(tmp_path: Path, header: bool, end: str) -> None:
    path = tmp_path / "t.CSV"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=end)
        writer.writerows([("tag", "text")] if header else [])
        writer.writerows([(str(i % 2), text) for i, text in enumerate(TEXTS)] + [("9", " ")])
    documents = ci.read_documents(path, *(("text", "tag") if header else (1, 0)))
    assert documents.texts == TEXTS
    assert documents.labels == ("0", "1", "0", "1", "0")
    assert ci.read_documents(path, "text" if header else 1).labels is None


def test_tabs_separate_and_quotes_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", 'a\tb\nx\t"Hello there\ny\tsecond "one"\n')
    assert ci.read_documents(path, "b", "a").texts == ('"Hello there', 'second "one"')
    assert read_table(write(tmp_path / "t.txt", "1\t2\n3\t4\n"), (1, 0)) == [("2", "1"), ("4", "3")]


def test_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "t.ndjson", '{"text": "a\\u00e4", "n": 1}\n\n{"n": 2, "text": "b\u2028c"}\n')
    assert ci.read_documents(path).texts == ("a\u00e4", "b\u2028c")
    assert ci.read_documents(path, "text", "n").labels == ("1", "2")


MISTAKES = {
    "a quote that is never closed": ("t.csv", 'a,b\nx,"one\ny,two\n', ("b",), "quotes"),
    "a row that is too short": ("t.csv", "a,b\nx\n", ("b",), "row 2 has 1 columns"),
    "a table without a column": ("t.csv", "a,b\n", (), "name the column"),
    "a negative column": ("t.csv", "a,b\n", (-1,), "column -1"),
    "a column of another type": ("t.csv", "a,b\n", (1.5,), "column 1.5"),
    "a list of columns": ("t.jsonl", '{"text": "a"}', (["text"],), "field ['text']"),
    "JSON by number": ("t.jsonl", '{"text": "a"}', (0,), "names"),
    "a lone surrogate": ("t.jsonl", '{"text": "a", "tag": "x\\ud800"}', ("text", "tag"), "line 1: 'tag'"),
    "a fraction as a label": ("t.jsonl", '{"text": "a", "tag": 2.5}', ("text", "tag"), "whole number"),
    "a list of objects": ("t.json", "[]", (), ".jsonl"),
    "columns of text": ("t.txt", "a\n", ("text",), "no columns"),
    "a separator within a line": ("t.txt", "one<|endoftext|>two\n", (), "line of its own"),
    "bytes that are no text": ("t.txt", "a\0b", (), "NUL"),
    "nothing": ("t.txt", "", (), "no documents"),
}


@pytest.mark.parametrize(("name", "content", "columns", "named"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(name: str, content: str, columns: tuple[object, ...], named: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    message = refusal(lambda: ci.read_documents(path, *columns))
    assert named in message
    assert str(path) in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "nowhere.txt" in refusal(lambda: ci.read_documents(tmp_path / "nowhere.txt"))
