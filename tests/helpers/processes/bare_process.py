"""Programs run by forks of one new interpreter, which has imported nothing of this project."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tests.helpers.paths import ROOT

NO_SEARCHES = "import gc; gc.disable()\n"
"""Imports would search all that they have made for garbage, and forks copy what they search."""
RUN_FORKS = """
import json, os, sys, tempfile, traceback

def run_program(program):
    try:
        exec(program, {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):  # a message, as the interpreter itself prints it
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

results = []
for program in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = os.fork()
        if process == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            code = run_program(program)
            sys.stdout.flush()
            os._exit(code)  # at once: an interpreter with torch takes long to be torn down
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        output.seek(0)
        errors.seek(0)
        results.append((code, output.read(), errors.read()))
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Ended:
    """The result of a program."""

    code: int
    stdout: str
    stderr: str


def run_programs(preparation: str, programs: Sequence[str]) -> dict[str, Ended]:
    """Run each program in a fork of its own of one new interpreter.

    Args:
        preparation: What the interpreter runs before it is forked, such as an import of torch,
            which would take most of the time of each program.
        programs: Sources of the programs.

    Returns:
        Program -> its result.
    """
    source = NO_SEARCHES + preparation + RUN_FORKS
    line = [sys.executable, "-c", source, json.dumps(list(programs))]
    result = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT)
    endings = (Ended(*x) for x in json.loads(result.stdout))
    return dict(zip(programs, endings, strict=True))
