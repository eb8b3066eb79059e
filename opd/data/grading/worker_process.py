"""Comparisons that could hang or exhaust the memory, made by a process of their own (opd.data.grading.worker)."""

import json
import select
import subprocess
import sys
import tempfile
import threading
from typing import Any

from diagnostics.errors import OperationFailed

SECONDS = 5.0
MEMORY = 4 << 30
GRACE = 5.0
"""Seconds beyond its own alarm after which a process is ended from outside."""


class GraderWorker:
    """A process of `opd.data.grading.worker`, started when first needed and again after each that died.

    Args:
      seconds: for one comparison. kind, memory: see `opd.data.grading.worker`; 0 bytes are no limit.
    """

    def __init__(self, seconds: float, kind: str = "math", memory: int = MEMORY) -> None:
        self.seconds, self.kind, self.memory = seconds, kind, memory
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, gold: str, given: str) -> dict[str, Any] | None:
        """What the comparison says; None if it took too long, or the process died of it.

        Safe to call from any thread.

        Raises:
          RuntimeError: the process does not start; says why.
        """
        with self.lock:
            process = self.process or self.start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps({"gold": gold, "given": given}) + "\n")
                process.stdin.flush()
                line = self.reply(process, self.seconds + GRACE)
            except BrokenPipeError:
                line = ""
            if not line:
                self.end()
                return None
            return json.loads(line)

    def start(self) -> "subprocess.Popen[str]":
        line = [
            sys.executable,
            "-m",
            "opd.data.grading.worker",
            self.kind,
            str(self.seconds),
            str(self.memory),
        ]
        with tempfile.TemporaryFile("w+") as complaints:  # a pipe nobody reads may fill and block
            own = ":" in self.kind
            process = subprocess.Popen(
                line,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if own else complaints,  # a user sees what the own function prints
                text=True,
            )
            self.process = process
            assert process.stdout is not None
            reply = json.loads(process.stdout.readline() or "{}")
            if "ready" not in reply:
                complaints.seek(0)
                why = reply.get("error") or complaints.read().strip()[-500:] or "it ended"
                self.end()
                raise OperationFailed(f"the grader {self.kind} did not start: {why}")
        return process

    def reply(self, process: "subprocess.Popen[str]", seconds: float) -> str:
        """The next line of the process; "" if it ended, or says nothing for so long."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else ""

    def end(self) -> None:
        """End the process, if there is one; the next comparison starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()  # closes the pipes
            self.process = None
