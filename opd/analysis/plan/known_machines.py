"""GPUs with the vendors' figures for dense products, and the CPU at hand."""

from dataclasses import replace

from diagnostics.errors import InvalidInput
from opd.analysis.plan.cpu_rates import measure_cpu
from opd.analysis.plan.machines import GB, Machine


def _gpu(
    name: str, memory: float, half_teraflops: float, teraflops: float, bandwidth: float, link: float
) -> Machine:
    """Return a GPU; memory and bandwidth in GB and GB/s, rates in Tflop/s, link in GB/s."""
    return Machine(
        name=name,
        kind="cuda",
        memory=memory * GB,
        half_flops=half_teraflops * 1e12,
        float32_flops=teraflops * 1e12,
        bandwidth=bandwidth * GB,
        elementwise_bandwidth=bandwidth * GB,
        link=link * GB,
    )


GPUS: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        _gpu("B200", 180, 2250, 75, 8000, 900),
        _gpu("H200", 141, 989, 67, 4800, 450),
        _gpu("H100", 80, 989, 67, 3350, 450),
        _gpu("A100-80", 80, 312, 19.5, 2039, 300),
        _gpu("A100-40", 40, 312, 19.5, 1555, 300),
        _gpu("L40S", 48, 362, 91.6, 864, 32),
        _gpu("A10", 24, 125, 31.2, 600, 32),
        _gpu("L4", 24, 121, 30.3, 300, 32),
        _gpu("5090", 32, 210, 105, 1792, 64),
        _gpu("4090", 24, 165, 82.6, 1008, 32),
        _gpu("3090", 24, 71, 35.6, 936, 32),
    )
}
"""Known GPUs by name; memory in GB of 1e9 bytes."""


def find_machine(name: str) -> Machine:
    """Return a known GPU, or the CPU of this machine with measured rates.

    Args:
        name: Name of a GPU, in any case, or "cpu".

    Returns:
        The machine.

    Raises:
        InvalidInput: The name is unknown.
    """
    if name.lower() == "cpu":
        return measure_cpu()
    by_lower_name = {known.lower(): machine for known, machine in GPUS.items()}
    if name.lower() not in by_lower_name:
        raise InvalidInput(
            f"unknown GPU {name!r}; known: {', '.join(GPUS)}, cpu; for another one set "
            "--gpu-memory (GB), --gpu-flops (Tflop/s of bfloat16) and --gpu-bandwidth (GB/s)"
        )
    return by_lower_name[name.lower()]


def with_figures(
    machine: Machine | None, memory: float, teraflops: float, bandwidth: float
) -> Machine:
    """Return a machine with the user's own figures in the place of known ones.

    Args:
        machine: A known machine; None to describe one by its figures alone.
        memory: GB; 0 keeps the known one.
        teraflops: Tflop/s of bfloat16 products; 0 keeps the known one.
        bandwidth: GB/s; 0 keeps the known one.

    Returns:
        The machine.

    Raises:
        InvalidInput: A figure is negative, or one is missing and there is no known machine.
    """
    figures = {"gpu_memory": memory, "gpu_flops": teraflops, "gpu_bandwidth": bandwidth}
    for name, value in figures.items():
        if value < 0:
            raise InvalidInput(f"{name} is {value:g}; expected a positive number")
    if machine is None:
        missing_names = [name for name, value in figures.items() if not value]
        missing_flags = [f"--{name.replace('_', '-')}" for name in missing_names]
        if missing_flags:
            raise InvalidInput(
                f"without a known --gpu, {', '.join(missing_flags)} must be set too; known GPUs: "
                f"{', '.join(GPUS)}, cpu"
            )
        return _gpu("own", memory, teraflops, teraflops / 8, bandwidth, 32)
    adjusted_machine = replace(
        machine,
        memory=memory * GB or machine.memory,
        half_flops=teraflops * 1e12 or machine.half_flops,
        bandwidth=bandwidth * GB or machine.bandwidth,
    )
    if machine.kind == "cuda" and bandwidth:
        adjusted_machine = replace(adjusted_machine, elementwise_bandwidth=bandwidth * GB)
    return adjusted_machine
