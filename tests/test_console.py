"""Results go to stdout and everything else to stderr, on a terminal and elsewhere."""

import io
import json
import os
import sys

import pytest

from cluda_cli import console
from cluda_cli.errors import DataError, Interrupted


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No styles, and 80 columns, whatever the environment says."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


class Terminal(io.StringIO):
    """A stderr that shows bars."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Time:
    """Stands in for the module `time`: seconds pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_messages_go_to_stderr_and_results_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console.info("reading [x/y]")
    console.warn("careful")
    console.result("42 [bold]")
    console.result_json({"a": None})
    out, err = capsys.readouterr()
    assert err == "reading [x/y]\nwarning: careful\n"
    first, _, rest = out.partition("\n")
    assert first == "42 [bold]" and json.loads(rest) == {"a": None}


def test_results_refuse_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        console.result_json(float("nan"))


def test_long_lines_are_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    console.info("a b " * 100)
    console.result("a b " * 100)
    assert [text.count("\n") for text in capsys.readouterr()] == [1, 1]


def test_an_error_says_where_what_and_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    console.error(DataError("is missing", "data/x.png", "copy it"))
    console.error(DataError("is missing"))
    console.error(Interrupted("stopped after step 3", "", "resume with ..."))
    expected = "error: data/x.png: is missing\n  copy it\nerror: is missing\nstopped after step 3\n  resume with ...\n"
    assert capsys.readouterr().err == expected


def test_control_characters_are_shown_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2J\x07\udcff\n.png"
    console.info(f"reads {name}")
    console.error(DataError("is missing", name))
    console.result(name)
    console.result_table(name, ["class", "%"], [[name, "1"]])
    out, err = capsys.readouterr()
    assert "a\\x1b[2J\\x07\\udcff" in out and "error: a\\x1b[2J\\x07\\udcff\\n.png: is missing" in err
    assert not {"\x1b", "\x07", "\udcff"} & set(out + err)


def test_names_are_not_read_as_markup(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    console.result_table("[other]", ["class", "[b]"], [["[/n]", "[red]1"], [":smile:", "2"]])
    out = capsys.readouterr().out
    assert all(name in out for name in ("[other]", "[b]", "[/n]", "[red]1", ":smile:"))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.Progress("reading [/n] [other]", 1) as progress:
        progress.advance("[/b] [x]")
    assert "reading [/n] [other]" in terminal.getvalue() and "[/b] [x]" in terminal.getvalue()


def test_closed_streams_are_stood_in_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    console.open_streams()
    with sys.stdin, sys.stdout, sys.stderr:
        console.result("42")
        console.warn("careful")
        console.result_table("t", ["class"], [["road"]])
        assert sys.stdin.read() == ""


def test_a_message_that_nobody_can_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        for _ in range(2):
            console.info("step 1 is done")
            console.error(DataError("is missing"))
        with console.Progress("training", 1) as progress:
            progress.advance()
        pipe.flush()


def test_a_result_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    for write in (lambda: console.result("42"), lambda: console.result_table("t", ["class"], [["road"]])):
        with pytest.raises(OSError, match="No space left") as full:
            write()
        assert full.value.filename == "standard output"


def test_a_muted_process_prints_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    console.mute()
    try:
        console.warn("careful")
        console.error(DataError("is missing"))
        console.result("42")
        with console.Progress("training", 1) as progress:
            progress.advance()
    finally:
        console.unmute()
    assert capsys.readouterr() == ("42\n", "")
    console.info("back")
    assert capsys.readouterr().err == "back\n"


def test_a_table_has_its_numbers_on_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    console.result_table("toy val", ["class", "all"], [["road", "9.50"], ["sky", "100.00"]])
    title, header, road, sky = (
        line for line in capsys.readouterr().out.splitlines() if any(letter.isalnum() for letter in line)
    )
    assert title.strip() == "toy val"
    assert header.split() == ["class", "all"] and road.split() == ["road", "9.50"]
    assert road.index("9.50") + 4 == sky.index("100.00") + 6 == header.index("all") + 3
    assert road.index("road") == sky.index("sky") == header.index("class")


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Time()
    monkeypatch.setattr(console, "time", clock)
    with console.Progress("training", 100, done=10) as progress:
        for _ in range(6):
            clock.now += 4
            progress.advance("loss 0.5")
    # A line every 10 s at the earliest. 6 steps of 4 s are done after 24 s, and 84 are left.
    assert capsys.readouterr().err == (
        "training 13/100, 5 min 48 s left loss 0.5\ntraining 16/100, 5 min 36 s left loss 0.5\n"
    )


def test_on_a_terminal_messages_and_a_second_bar_do_not_disturb_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.Progress("training", 3) as progress:
        progress.advance("loss 0.5")
        console.info("step 1 is done")
        with progress.paused(), console.Progress("evaluating", 2) as inner:
            inner.advance()
        progress.advance()
        assert (progress.done, progress.note) == (2, "loss 0.5")
    console.info("after the bar")
    text = terminal.getvalue()
    for shown in ("training", "loss 0.5", "step 1 is done\n", "evaluating"):
        assert shown in text
    assert text.endswith("after the bar\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7325, "2 h 02 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text
