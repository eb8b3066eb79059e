"""Client of the comparison process (opd.data.grading.worker), which may hang or exhaust memory."""

import json
import select
import subprocess
import tempfile
import threading
from typing import Any

from diagnostics.errors import OperationFailed
from diagnostics.io.module_process import module_command

TIMEOUT = 5.0
MEMORY_LIMIT = 4 << 30
GRACE_SECONDS = 5.0
"""Seconds beyond its own time limit after which a process is killed."""


class GraderWorker:
    """A process of `opd.data.grading.worker`, started on demand and restarted after it died.

    Args:
        seconds: Time limit of one comparison.
        kind: Kind of comparison; see `opd.data.grading.worker`.
        memory: Memory limit in bytes, 0 for none.
    """

    def __init__(self, seconds: float, kind: str = "math", memory: int = MEMORY_LIMIT) -> None:
        self.seconds, self.kind, self.memory = seconds, kind, memory
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def __call__(self, gold: str, response_answer: str) -> dict[str, Any] | None:
        """Compare two answers; thread-safe.

        Args:
            gold: The reference answer.
            response_answer: The answer of a response.

        Returns:
            The result of the comparison; None after a timeout or if the process died.

        Raises:
            OperationFailed: The process does not start; the message contains the reason.
        """
        with self.lock:
            process = self.process or self.start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps({"gold": gold, "given": response_answer}) + "\n")
                process.stdin.flush()
                line = self.reply(process, self.seconds + GRACE_SECONDS)
            except BrokenPipeError:
                line = ""
            if not line:
                self.end()
                return None
            return json.loads(line)

    def start(self) -> "subprocess.Popen[str]":
        """Start the process and wait until it is ready."""
        command_line = module_command(
            "opd.data.grading.worker", self.kind, self.seconds, self.memory
        )
        with tempfile.TemporaryFile("w+") as stderr_file:  # an unread pipe may fill up and block
            is_user_function = ":" in self.kind
            process = subprocess.Popen(
                command_line,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None
                if is_user_function
                else stderr_file,  # show what the user's function prints
                text=True,
            )
            self.process = process
            assert process.stdout is not None
            reply = json.loads(process.stdout.readline() or "{}")
            if "ready" not in reply:
                stderr_file.seek(0)
                reason = reply.get("error") or stderr_file.read().strip()[-500:] or "it ended"
                self.end()
                raise OperationFailed(f"the grader {self.kind} did not start: {reason}")
        return process

    def reply(self, process: "subprocess.Popen[str]", seconds: float) -> str:
        """Return the next line of the process; "" if it ended or sent nothing within `seconds`."""
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if readable else ""

    def end(self) -> None:
        """Kill the process, if there is one; the next comparison starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()  # closes the pipes
            self.process = None
