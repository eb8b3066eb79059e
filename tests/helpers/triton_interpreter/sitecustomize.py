"""Let vLLM for CPUs use Triton's interpreter, so that its model runner V2 runs without a GPU.

vLLM uses the model runner V2 only with Triton, and Triton has no backend for CPUs. Its interpreter
(TRITON_INTERPRET=1) runs kernels on tensors of the CPU. Every process whose PYTHONPATH has this
folder declares a backend for CPUs, which the interpreter never asks to compile.
"""

from types import SimpleNamespace
from typing import Any

import triton.backends
from triton.runtime.driver import driver


class InterpreterDriver:
    """What Triton and vLLM ask a driver for."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


triton.backends.backends["cpu"] = SimpleNamespace(driver=InterpreterDriver, compiler=None)
driver.set_active(InterpreterDriver())
