"""A long run that is killed, starved of disk and left by its teacher, against one that is let be.

    python -m benchmarks.soak FOLDER [--steps 2000] [--mean-seconds 15] [--processes 1]

The smoke recipe with its teacher on a server, twice with the same settings: undisturbed, and under
disturbances at random moments until it is done:

- kill -9 of the run, or of one of its processes;
- a full disk: a file grows until nothing more can be written, and is taken away when the run has
  ended. FOLDER has to be a small file system of its own for that (`mount -t tmpfs -o size=600m`);
  otherwise this disturbance is left out;
- kill -9 of the teacher's server, which comes back after up to five seconds.

After every end of the run its folder is read: the steps of rows.jsonl are 0, 1, 2, ... each once
(its last line may be cut, and the next start drops it), and every checkpoint is whole. At the end
rows, evaluations and weights have to be those of the undisturbed run, bit for bit with one process.
Prints one JSON object; the resident memory of the undisturbed run is sampled every second.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

SMALL = 4 << 30
"""Bytes; a file system of more is not filled."""
PORT = 8361


def serve(folder: str, port: str) -> None:
    """Answer as the teacher until killed."""
    import torch

    from tests.helpers.fake_teacher_server import Teacher, serving

    torch.set_num_threads(1)
    with serving(Teacher(Path(folder)), int(port)):
        signal.pause()


def server(pair: Path) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "benchmarks.soak", "--serve", str(pair / "teacher"), str(PORT)]
    return subprocess.Popen(line)


def command(pair: Path, out: Path, steps: int, processes: int) -> list[str]:
    words = {
        "student": pair / "student",
        "teacher": f"http://127.0.0.1:{PORT}/v1",
        "out": out,
        "steps": steps,
        "save_every": 5,
        "eval_every": 100,
        "save_batch_every": 100,
        "full_metrics_every": 10,
        "device": "cpu",
        "teacher_timeout": 120,
    }
    options = [str(x) for name, value in words.items() for x in (f"--{name}", value)]
    run = ["-m", "opd.cli.main", "train", "smoke", *options]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(several if processes > 1 else []), *run]


def members(process: subprocess.Popen[bytes]) -> list[int]:
    """The process, or those that it started."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = listed.read_text().split() if listed.exists() else []
    return [int(c) for c in children] or [process.pid]


def resident(pid: int) -> int:
    """Kilobytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def steps_of(folder: Path) -> list[int]:
    """The steps of whole rows; refuses a broken one that is not the last."""
    path = folder / "rows.jsonl"
    lines = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line)["step"] for line in lines[:-1]]


def examine(folder: Path) -> None:
    steps = steps_of(folder)
    assert steps == list(range(len(steps))), f"steps lost or repeated: {steps[-20:]}"
    for checkpoint in (folder / "checkpoints").glob("step_*[0-9]"):
        for file in checkpoint.rglob("*.safetensors"):
            assert load_file(file), file
        assert json.loads((checkpoint / "state.json").read_text())["step"] >= 0


def ballast(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Fill the disk until the run has ended, however it takes that."""
    path = folder / "ballast"
    with open(path, "wb", buffering=0) as file:
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            with suppress(OSError):
                file.write(bytes(1 << 16))
                continue
            with suppress(OSError):
                file.write(bytes(512))
                continue
            time.sleep(0.05)
    path.unlink()


def undisturbed(line: list[str], log: Any) -> dict[str, Any]:
    """Run to the end; memory by time, in kilobytes."""
    process, seen = subprocess.Popen(line, stdout=log, stderr=log), []
    began = time.monotonic()
    while process.poll() is None:
        with suppress(OSError, StopIteration):
            seen.append(max(resident(pid) for pid in members(process)))
        time.sleep(1)
    assert process.returncode == 0, "the undisturbed run failed"
    fifth = len(seen) // 5
    return {
        "seconds": round(time.monotonic() - began, 1),
        "memory_MiB": {
            "second fifth": round(max(seen[fifth : 2 * fifth]) / 1024, 1),
            "last fifth": round(max(seen[-fifth:]) / 1024, 1),
        },
    }


def disturbed(
    line: list[str], folder: Path, pair: Path, mean: float, chance: random.Random, log: Any
) -> dict[str, Any]:
    """Run to the end under disturbances."""
    teacher, done = server(pair), Counter[str]()
    small = shutil.disk_usage(folder).total < SMALL
    kinds = ["kill", "server", *(["disk"] * small)]
    began, again = time.monotonic(), 0
    try:
        while True:
            process = subprocess.Popen(line, stdout=log, stderr=log)
            wait = time.monotonic() + chance.expovariate(1 / mean)
            kind = chance.choice(kinds)
            while process.poll() is None:
                time.sleep(0.02)
                if time.monotonic() < wait:
                    continue
                if kind == "kill":
                    with suppress(ProcessLookupError):
                        os.kill(chance.choice(members(process)), signal.SIGKILL)
                    process.wait()
                elif kind == "disk":
                    ballast(folder, process)
                else:
                    teacher.kill()
                    teacher.wait()
                    time.sleep(chance.uniform(0, 5))
                    teacher = server(pair)
                done[kind] += 1
                wait = time.monotonic() + chance.expovariate(1 / mean)
                kind = chance.choice(kinds)
            examine(folder / "soaked")
            if process.returncode == 0:
                break
            again += 1
            assert again < 2000, "the run does not come to an end"
    finally:
        teacher.kill()
    return {
        "seconds": round(time.monotonic() - began, 1),
        "disturbances": dict(done),
        "starts": again + 1,
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if not k.startswith("seconds/")} for x in lines]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--mean-seconds", type=float, default=15.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    folder, steps, processes = given.folder, given.steps, given.processes
    pair = folder / "pair"
    lab = [sys.executable, "-m", "opd.cli.main", "lab", "--tiny", "--out", str(pair)]
    subprocess.run(lab, check=True)
    with open(folder / "log.txt", "w") as log:
        teacher = server(pair)
        whole = undisturbed(command(pair, folder / "whole", steps, processes), log)
        teacher.kill()
        line = command(pair, folder / "soaked", steps, processes)
        chance = random.Random(given.seed)
        soaked = disturbed(line, folder, pair, given.mean_seconds, chance, log)
    one, other = (folder / name for name in ("whole", "soaked"))
    weights = [(d / "final" / "model.safetensors").read_bytes() for d in (one, other)]
    evaluations = [(d / "evals.jsonl").read_text() for d in (one, other)]
    same = {
        "rows": json.dumps(rows(one)) == json.dumps(rows(other)),
        "steps": steps_of(other) == list(range(steps)),
        "evaluations": evaluations[0] == evaluations[1],
        "weights": weights[0] == weights[1],
    }
    print(
        json.dumps(
            {
                "steps": steps,
                "processes": processes,
                "undisturbed": whole,
                **soaked,
                "the same": same,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main(sys.argv[1:])
