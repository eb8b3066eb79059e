"""Pass the weights of verl's actor to the CPU rollout servers in a file."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from verl.workers.rollout.base import BaseRollout


class Weights(BaseRollout):
    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(
        self,
        weights: Generator[tuple[str, torch.Tensor], None, None],
        global_steps: int = 0,
        **_: Any,
    ) -> None:
        tensors = {name: x.detach().cpu().clone() for name, x in weights}
        if torch.distributed.get_rank() == 0:
            path = Path(os.environ["VERL_CPU_WEIGHTS"])
            torch.save({"weights": tensors, "step": global_steps}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
