"""What users are told, and the exit code that scripts see."""

import pytest

from cluda_cli.errors import (
    CludaError,
    DataError,
    EnvironmentProblem,
    Interrupted,
    RunError,
    SettingsError,
    first_line,
    is_out_of_memory,
    nearest,
)


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (CludaError("is missing"), "is missing"),
        (CludaError("is missing", "data/x.png"), "data/x.png: is missing"),
        (CludaError("is missing", "", "copy it"), "is missing -> copy it"),
        (CludaError("is missing", "data/x.png", "copy it"), "data/x.png: is missing -> copy it"),
    ],
)
def test_text_says_where_what_and_the_remedy(problem: CludaError, text: str) -> None:
    assert str(problem) == text == problem.args[0]


def test_each_kind_has_its_exit_code() -> None:
    kinds = (RunError, SettingsError, DataError, EnvironmentProblem, Interrupted)
    assert [kind("x").exit_code for kind in kinds] == [1, 2, 3, 4, 130]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n one \n"), "one"),
        (ValueError(), "ValueError"),
        (OSError(" "), "OSError"),
    ],
)
def test_first_line_of_any_exception(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_nearest_name_is_found_and_a_strange_one_is_not() -> None:
    assert nearest("daformr", ["dacs", "daformer", "hrda"]) == "daformer"
    assert nearest("zebra", ["dacs", "daformer"]) == ""
    assert nearest("dacs", []) == ""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (type("_ArrayMemoryError", (MemoryError,), {})(), True),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("size mismatch"), False),
        (OSError("no space"), False),
    ],
)
def test_an_allocation_that_failed_is_known(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
