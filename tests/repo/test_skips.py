"""A test that is skipped without a listed reason fails a session that asks for it."""

import pytest

from tests.conftest import ENGINES, SkipCheck

SKIPPED = """
import pytest

@pytest.mark.skip(reason="no such package")
def test_skipped():
    pass

def test_passed():
    pass
"""


@pytest.mark.parametrize("processes", [0, 1])
def test_a_new_skip_fails_the_session(pytester: pytest.Pytester, processes: int) -> None:
    pytester.makepyfile(test_module=SKIPPED)
    words = ["-n", str(processes)] if processes else []
    check = SkipCheck({})
    result = pytester.inline_run(*words, plugins=[check])
    assert check.unexpected == ["test_module.py::test_skipped: Skipped: no such package"]
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_listed_skip_passes(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_module=SKIPPED)
    check = SkipCheck({"test_module.py::test_skipped": "the package is not published"})
    assert pytester.inline_run(plugins=[check]).ret == pytest.ExitCode.OK


def test_a_module_that_is_skipped_as_one_fails_the_session(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_module="import pytest\npytest.importorskip('no_such_package')")
    check = SkipCheck({})
    pytester.inline_run(plugins=[check])
    assert "no_such_package" in check.unexpected[0]


def test_the_engines_of_make_are_those_that_are_marked(pytestconfig: pytest.Config) -> None:
    makefile = (pytestconfig.rootpath / "Makefile").read_text()
    deselected = " and ".join(f"not {mark}" for mark in ENGINES)
    assert f'-m "{deselected}"' in makefile
    for mark in ENGINES:
        selected = (f"-m {mark} ", f'-m "{mark} and not slow" ')
        assert any(words in makefile for words in selected), "make test-engines runs it"
