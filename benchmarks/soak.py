"""Compare a long run under kills, full disks and server restarts with an undisturbed run.

    python -m benchmarks.soak FOLDER [--steps 2000] [--mean-seconds 15] [--processes 1]

The smoke recipe with its teacher on a server is run twice with the same settings: undisturbed, and
with disturbances at random moments until it is done:

- kill -9 of the run, or of one of its processes;
- a full disk: a file grows until nothing more can be written, and is deleted when the run has
  ended. This needs FOLDER to be a small file system of its own (`mount -t tmpfs -o size=600m`);
  otherwise this disturbance is skipped;
- kill -9 of the teacher's server, which is restarted after up to five seconds.

Each time the run has ended, its folder is checked: the steps of rows.jsonl are 0, 1, 2, ... once
each (its last line may be truncated, which the next start removes), and every checkpoint is
complete. Finally rows, evaluations and weights must equal those of the undisturbed run, bit for
bit with one process. Prints one JSON object; the resident memory of the undisturbed run is sampled
every second.
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
"""Bytes; larger file systems are not filled."""
PORT = 8361


def serve(folder: str, port: str) -> None:
    """Serve the teacher until killed."""
    import torch

    from tests.helpers.servers.teacher_server import FakeTeacher, serve

    torch.set_num_threads(1)
    with serve(FakeTeacher(Path(folder)), int(port)):
        signal.pause()


def start_server(pair: Path) -> subprocess.Popen[bytes]:
    """Start the teacher's server as a process."""
    line = [sys.executable, "-m", "benchmarks.soak", "--serve", str(pair / "teacher"), str(PORT)]
    return subprocess.Popen(line)


def train_command(pair: Path, out: Path, steps: int, processes: int) -> list[str]:
    """Return the command line of the run."""
    flags = {
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
    options = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    run = ["-m", "opd.cli.main", "train", "smoke", *options]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(several if processes > 1 else []), *run]


def worker_pids(process: subprocess.Popen[bytes]) -> list[int]:
    """Return the ids of the process's children, or of the process itself if it has none."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = listed.read_text().split() if listed.exists() else []
    return [int(c) for c in children] or [process.pid]


def resident_kilobytes(pid: int) -> int:
    """Return the resident memory of a process in kilobytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def read_steps(folder: Path) -> list[int]:
    """Return the steps of complete rows; a broken row other than the last raises."""
    path = folder / "rows.jsonl"
    lines = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line)["step"] for line in lines[:-1]]


def check_run_folder(folder: Path) -> None:
    """Check that no step is lost or repeated and that checkpoints are complete."""
    steps = read_steps(folder)
    assert steps == list(range(len(steps))), f"steps lost or repeated: {steps[-20:]}"
    for checkpoint in (folder / "checkpoints").glob("step_*[0-9]"):
        for file in checkpoint.rglob("*.safetensors"):
            assert load_file(file), file
        assert json.loads((checkpoint / "state.json").read_text())["step"] >= 0


def fill_disk(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Fill the disk until the run has ended."""
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


def run_undisturbed(line: list[str], log: Any) -> dict[str, Any]:
    """Run to the end; return seconds and memory over time."""
    process, resident_by_second = subprocess.Popen(line, stdout=log, stderr=log), []
    began = time.monotonic()
    while process.poll() is None:
        with suppress(OSError, StopIteration):
            resident_by_second.append(max(resident_kilobytes(pid) for pid in worker_pids(process)))
        time.sleep(1)
    assert process.returncode == 0, "the undisturbed run failed"
    fifth = len(resident_by_second) // 5
    return {
        "seconds": round(time.monotonic() - began, 1),
        "memory_MiB": {
            "second fifth": round(max(resident_by_second[fifth : 2 * fifth]) / 1024, 1),
            "last fifth": round(max(resident_by_second[-fifth:]) / 1024, 1),
        },
    }


def run_disturbed(
    line: list[str], folder: Path, pair: Path, mean: float, chance: random.Random, log: Any
) -> dict[str, Any]:
    """Run to the end with disturbances."""
    teacher, disturbances = start_server(pair), Counter[str]()
    small = shutil.disk_usage(folder).total < SMALL
    kinds = ["kill", "server", *(["disk"] * small)]
    began, restarts = time.monotonic(), 0
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
                        os.kill(chance.choice(worker_pids(process)), signal.SIGKILL)
                    process.wait()
                elif kind == "disk":
                    fill_disk(folder, process)
                else:
                    teacher.kill()
                    teacher.wait()
                    time.sleep(chance.uniform(0, 5))
                    teacher = start_server(pair)
                disturbances[kind] += 1
                wait = time.monotonic() + chance.expovariate(1 / mean)
                kind = chance.choice(kinds)
            check_run_folder(folder / "soaked")
            if process.returncode == 0:
                break
            restarts += 1
            assert restarts < 2000, "the run did not finish after 2000 restarts"
    finally:
        teacher.kill()
    return {
        "seconds": round(time.monotonic() - began, 1),
        "disturbances": dict(disturbances),
        "starts": restarts + 1,
    }


def read_untimed_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows without their times."""
    lines = (folder / "rows.jsonl").read_text().splitlines()
    timings = ("seconds/", "machine/")
    return [{k: v for k, v in json.loads(x).items() if not k.startswith(timings)} for x in lines]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--mean-seconds", type=float, default=15.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    folder, steps, processes = args.folder, args.steps, args.processes
    pair = folder / "pair"
    lab = [sys.executable, "-m", "opd.cli.main", "lab", "--tiny", "--out", str(pair)]
    subprocess.run(lab, check=True)
    with open(folder / "log.txt", "w") as log:
        teacher = start_server(pair)
        undisturbed = run_undisturbed(train_command(pair, folder / "whole", steps, processes), log)
        teacher.kill()
        line = train_command(pair, folder / "soaked", steps, processes)
        chance = random.Random(args.seed)
        soaked = run_disturbed(line, folder, pair, args.mean_seconds, chance, log)
    reference_folder, soaked_folder = (folder / name for name in ("whole", "soaked"))
    weights = [
        (d / "final" / "model.safetensors").read_bytes() for d in (reference_folder, soaked_folder)
    ]
    evaluations = [(d / "evals.jsonl").read_text() for d in (reference_folder, soaked_folder)]
    equalities = {
        "rows": json.dumps(read_untimed_rows(reference_folder))
        == json.dumps(read_untimed_rows(soaked_folder)),
        "steps": read_steps(soaked_folder) == list(range(steps)),
        "evaluations": evaluations[0] == evaluations[1],
        "weights": weights[0] == weights[1],
    }
    print(
        json.dumps(
            {
                "steps": steps,
                "processes": processes,
                "undisturbed": undisturbed,
                **soaked,
                "the same": equalities,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main(sys.argv[1:])
