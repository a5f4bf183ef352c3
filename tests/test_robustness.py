"""The trials of damaged files themselves: every kind has cases, and a case follows from its seed and number alone."""

import json
from random import Random

import pytest

from benchmarks import robustness
from tests.robustness import bases, fuzz

# Kinds whose whole files are made in no time, and how.
QUICK = {
    "documents": bases.write_documents,
    "template": bases.write_templates,
    "calibration": bases.write_calibrations,
}


@pytest.fixture(params=QUICK)
def kind(request, tmp_path):
    QUICK[request.param](tmp_path / request.param)
    return request.param


def test_every_kind_has_cases():
    assert fuzz.DAMAGES.keys() == fuzz.ATTEMPTS.keys() == fuzz.CASES.keys()
    assert sum(fuzz.CASES.values()) >= 20_000


def test_what_is_whole_loads(kind, tmp_path):
    for base in (tmp_path / kind).iterdir():
        fuzz.ATTEMPTS[kind](base, Random(0))


def test_a_case_follows_from_its_seed_and_number(kind, tmp_path):
    def case(number: int) -> dict[str, bytes]:
        fuzz.damaged_copy(kind, 0, number, tmp_path, tmp_path / "case")
        return {file.name: file.read_bytes() for file in (tmp_path / "case").iterdir()}

    whole = [{file.name: file.read_bytes() for file in base.iterdir()} for base in (tmp_path / kind).iterdir()]
    damaged = [case(number) for number in range(20)]
    assert [case(number) for number in range(20)] == damaged
    assert sum(one not in whole for one in damaged) > 10
    assert whole == [{file.name: file.read_bytes() for file in base.iterdir()} for base in (tmp_path / kind).iterdir()]


def test_damaged_files_load_or_are_refused(kind, tmp_path):
    for number in range(60):
        random = fuzz.damaged_copy(kind, 1, number, tmp_path, tmp_path / "case")
        result, detail = fuzz.outcome(kind, tmp_path / "case", random)
        assert result != "failed", f"case {number}: {detail}"


def test_what_ends_otherwise_is_a_failure(tmp_path, monkeypatch):
    def raise_other(folder, random):
        raise StopIteration("two\nlines")

    monkeypatch.setitem(fuzz.ATTEMPTS, "documents", raise_other)
    assert fuzz.outcome("documents", tmp_path, Random(0))[0] == "failed"


def test_the_table_adds_up(monkeypatch):
    counts = {"cases": 10, "loaded": 2, "refused": 5, "not_run": 3, "failed": 0, "seed": 4, "seconds": 60}
    made = {"hardware": "a computer", "versions": {"jax": "0"}, "git_revision": "abc", "date": "today"}
    lines = [
        {"kind": kind, "slowest_seconds": number / 4, "most_mebibytes": 100 + number, **counts, **made}
        for number, kind in enumerate(fuzz.KINDS)
    ]
    monkeypatch.setattr(robustness, "read_results", lambda name: json.loads(json.dumps(lines)))
    total = f"| all | {7 * len(lines)} | {2 * len(lines)} | {5 * len(lines)} | 0 | 3.00 | {99 + len(lines)} |"
    assert total in robustness.table()
