"""Processes that are forked from one that has imported torch and this project already.

A new interpreter spends seconds on these imports. Tests that are about what happens in a process,
and not about how it is started, use `start_process` and `start_ranks`.
"""

import multiprocessing
import os
import resource
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
"""One server for each worker of pytest; it imports the module below when it is first used."""
CONTEXT.set_forkserver_preload(["tests.helpers.processes.warm_imports"])


@dataclass
class WarmProcess:
    """A running process and the files of its output."""

    process: BaseProcess
    stdout_path: Path
    stderr_path: Path

    def wait(self, timeout: float = 600) -> int:
        """Wait for the end of the process; returns its exit code, negative for a signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout} s: {self.stderr}")
        return self.process.exitcode

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return self.stdout_path.read_text()

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()


def start_process(
    folder: Path,
    target: Callable[..., object],
    *arguments: Any,
    environment: dict[str, str] | None = None,
    name: str = "process",
) -> WarmProcess:
    """Call `target` of an importable module in a process; its output goes to files of `folder`."""
    paths = folder / f"{name}.stdout", folder / f"{name}.stderr"
    process = CONTEXT.Process(
        target=call_in_process, args=(paths, environment or {}, target, arguments)
    )
    process.start()
    return WarmProcess(process, *paths)


def run_process(
    folder: Path,
    target: Callable[..., object],
    *arguments: Any,
    environment: dict[str, str] | None = None,
    timeout: float = 600,
) -> WarmProcess:
    """Call `target` in a process and wait for its end."""
    process = start_process(folder, target, *arguments, environment=environment)
    process.wait(timeout)
    return process


def run_module(words: Sequence[str], *, closed_pipe: bool = False) -> None:
    """Do in this process what `python -m WORDS` does, perhaps with a closed pipe as its output."""
    if closed_pipe:
        read_end, write_end = os.pipe()
        os.close(read_end)
        os.dup2(write_end, 1)
        os.close(write_end)
    sys.argv = [*words]
    sys.modules.pop(words[0], None)  # or runpy warns that the module is imported
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def skip_file_sync() -> None:
    """Let `os.fsync` return at once in this process.

    Tests kill processes, never the machine, so they need not wait for the disk.
    """
    os.fsync = lambda descriptor: None


def call_in_process(
    paths: tuple[Path, Path],
    environment: dict[str, str],
    target: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    """Redirect the output, set the environment, call the target."""
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor, path in zip((1, 2), paths, strict=True):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.update(environment)
    skip_file_sync()
    target(*arguments)


def start_ranks(
    folder: Path, target: Callable[..., object], *arguments: Any, count: int = 2
) -> list[WarmProcess]:
    """Call `target` in `count` processes, with the variables that torchrun sets for its ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [
        start_process(
            folder,
            target,
            *arguments,
            environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            name=f"rank {rank}",
        )
        for rank in range(count)
    ]


def wait_for_ranks(ranks: list[WarmProcess], timeout: float = 600) -> tuple[int, str]:
    """Wait for all ranks; like torchrun, end them all when one fails.

    Returns:
        The first exit code that is not 0, otherwise 0, and the output of all ranks.
    """
    deadline = time.monotonic() + timeout
    code = 0
    while code == 0 and any(rank.exit_code is None for rank in ranks):
        assert time.monotonic() < deadline, "".join(rank.stderr for rank in ranks)
        time.sleep(0.01)
        code = next((rank.exit_code for rank in ranks if rank.exit_code), 0)
    code = next((rank.exit_code for rank in ranks if rank.exit_code), 0)
    for rank in ranks:
        if rank.exit_code is None:
            rank.process.terminate()
        rank.wait()
    return code, "".join(rank.stdout + rank.stderr for rank in ranks)


def run_ranks(folder: Path, target: Callable[..., object], *arguments: Any, count: int = 2) -> None:
    """Call `target` in `count` ranks and wait until all have ended without an error."""
    code, output = wait_for_ranks(start_ranks(folder, target, *arguments, count=count))
    assert code == 0, output


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Let no file of this process grow beyond `limit` bytes, as on a full disk.

    The limit ends with the context, so that a traceback can be written to the file of its output.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
