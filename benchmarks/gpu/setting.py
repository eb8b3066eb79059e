"""The machine, its packages, and the sizes that fit it."""

import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.study import cpu_name

T = TypeVar("T")

REQUIRED = ("torch", "transformers")
OPTIONAL = {
    "triton": "the K gathered head rows run as torch operations, many times slower, and sampling "
    "is not compiled",
    "liger_kernel": "no comparison with Liger's chunked JSD",
    "trl": "no comparison with TRL's fused losses and its whole step",
    "peft": "LoRA is not checked",
    "bitsandbytes": "quantised teachers are not checked",
}
"""Package -> what it costs to lack it."""


@dataclass(frozen=True)
class Setting:
    """Where the parts run, and whether at toy sizes."""

    device: str
    """"cuda" or "cpu"."""
    toy: bool
    small: bool = False
    """Whether to stay within 24 GB, whatever the device has."""

    def choose(self, toy: T, large: T) -> T:
        """Return the size for this run."""
        return toy if self.toy else large

    def free_bytes(self) -> float:
        """Return the free memory of the device; 2 GiB stands for a CPU."""
        if self.device == "cpu":
            return 2.0**31
        free = torch.cuda.mem_get_info()[0]
        # what the caching allocator keeps without using it is free too
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return min(free, 22e9) if self.small else free

    def fitting(self, count: int, bytes_each: float) -> int:
        """Return the count, halved until so many items take at most 85 % of the free memory."""
        while count > 1 and count * bytes_each > 0.85 * self.free_bytes():
            count //= 2
        return count


def missing_packages() -> dict[str, str]:
    """Return the packages that are not installed, and what each costs.

    Raises:
        SystemExit: torch or transformers is missing.
    """
    lacking = [name for name in REQUIRED if find_spec(name) is None]
    if lacking:
        raise SystemExit(f"not installed: {', '.join(lacking)}; pip install {' '.join(lacking)}")
    return {name: cost for name, cost in OPTIONAL.items() if find_spec(name) is None}


def describe_machine(setting: Setting) -> dict[str, str]:
    """Return the device, its driver, versions of packages and the commit."""
    facts = {"processor": cpu_name(), "python": platform.python_version()}
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}, {torch.cuda.device_count()} in this machine"
        )
        facts["free memory"] = f"{setting.free_bytes() / 2**30:.1f} GiB"
        facts["CUDA of torch"] = str(torch.version.cuda)
        driver = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["driver"] = driver.partition("\n")[0]
    for name in (*REQUIRED, *OPTIONAL):
        if find_spec(name) is not None:
            facts[name] = version(name.replace("_", "-"))
    root = str(Path(__file__).parents[2])
    changed = " with changes" if command_output("git", "-C", root, "status", "--porcelain") else ""
    commit = command_output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    facts["commit"] = f"{commit}{changed}"
    return facts


def command_output(*line: str) -> str:
    """Return what a program printed; "unknown" if it is not installed or failed."""
    try:
        process = subprocess.run(line, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return process.stdout.strip()
