"""What long work says of its progress, in a terminal and in a log."""

import contextlib
import io
import sys

import pytest

from coreinfer_jax import progress as shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("others", [0, 3])
def test_a_log_gets_a_line_for_each_state_it_is_due(monkeypatch, capsys, others):
    with contextlib.ExitStack() as unfinished:
        for _ in range(others):
            unfinished.enter_context(shown.progress([], total=2, desc="around", unit="text"))
        monkeypatch.setattr(shown, "SECONDS", 0)
        assert list(shown.progress("abc", desc="reading", unit="text")) == ["a", "b", "c"]
        written = capsys.readouterr().err
    assert "\r" not in written
    lines = written.splitlines()
    assert [line.partition(" (text), ")[0] for line in lines][-3:] == [f"reading: {i} of 3" for i in (1, 2, 3)]
    assert all(line.endswith(" left") for line in lines)


def test_short_work_says_nothing_in_a_log(capsys):
    with shown.progress([], total=2, desc="choosing", unit="text") as bar:
        bar.update()
        bar.update()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("leave", [False, True])
def test_a_terminal_has_a_bar_in_place(monkeypatch, leave):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in shown.progress(range(3), desc="reading", unit="text", leave=leave):
        pass
    assert "\rreading:" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n") == leave
