"""The prediction that `opd train` prints before a run on a GPU."""

import re
import sys
from dataclasses import replace

import torch

from opd.analysis.plan.known_machines import GPUS
from opd.analysis.plan.machines import GB, Machine
from opd.analysis.plan.plan import Plan, make_plan
from opd.analysis.plan.report import format_line
from opd.config.settings import Config
from opd.models.loading import resolve_device
from opd.runtime import distributed


def print_prediction(config: Config) -> None:
    """Print the predicted memory of a run on a GPU, and a warning where it exceeds what is free.

    Nothing happens on a CPU. A model that cannot be planned is said, and trained nevertheless.

    Args:
        config: Valid settings.
    """
    if distributed.rank() or torch.device(resolve_device(config.hardware.device)).type != "cuda":
        return
    free, total = torch.cuda.mem_get_info()
    machine = machine_of_device(torch.cuda.get_device_name(), total)
    try:
        plan = make_plan(config, machine, distributed.world_size())
    except Exception as error:  # a prediction must not stop a run
        print(f"memory is not predicted: {error}", file=sys.stderr)
        return
    print(start_message(plan, free), file=sys.stderr)


def machine_of_device(name: str, memory: float) -> Machine:
    """Return the known GPU that a device is, with its actual memory.

    Args:
        name: Name that CUDA gives the device, such as "NVIDIA A100-SXM4-80GB".
        memory: Its bytes.

    Returns:
        The machine; an unknown device has the rates of the slowest known one.
    """
    matches = [
        known
        for known in GPUS
        if all(
            re.search(rf"(?<![A-Za-z0-9]){part}(?!\d)", name, re.IGNORECASE)
            for part in known.split("-")
        )
    ]
    if matches:
        return replace(GPUS[max(matches, key=len)], memory=memory)
    slowest = min(GPUS.values(), key=lambda machine: machine.bandwidth)
    return replace(slowest, name=f"{name} (unknown: rates of {slowest.name})", memory=memory)


def start_message(plan: Plan, free: float) -> str:
    """Return the prediction in a line, with a second one where it exceeds the free memory.

    Args:
        plan: The plan.
        free: Free bytes of the device.

    Returns:
        The text.
    """
    line = f"{format_line(plan)}; free: {free / GB:.3g} GB of {plan.machine.name}"
    if plan.peak_bytes <= free:
        return line
    return (
        f"{line}\nWARNING: the run probably does not fit in memory; `opd plan` with the same "
        "settings says what to change"
    )
