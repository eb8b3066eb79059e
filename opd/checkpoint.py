"""Checkpoints: everything that a run needs to go on to the same bits, written whole or not at all.

A folder step_N holds the student as Hugging Face and peft save it, the optimizer with its masters,
the teacher if it moves, and the number of steps done. The optimizer's tensors are safetensors files
of torch.distributed.checkpoint, to which every process writes its part; any number of processes,
sharded or not, can read them.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint import load as load_shards
from torch.distributed.checkpoint import save as save_shards

from diagnostics.errors import OperationFailed
from opd import processes, runlog
from opd.model import Pair
from opd.optimizer import Optimizer
from opd.sharding import plain


def save(folder: Path, pair: Pair, optimizer: Optimizer, step: int, moving_teacher: bool) -> None:
    """Write checkpoints/step_N, then remove older ones. Every process has to call."""
    final = folder / "checkpoints" / f"step_{step:06d}"
    network = plain(pair.student)
    with runlog.whole_folder(final) as part:
        if processes.rank() == 0:
            network.save_pretrained(part)
            pair.tokenizer.save_pretrained(part)
            if moving_teacher:
                save_model(pair.teacher.network, str(part / "teacher.safetensors"))
            runlog.write_text(part / "state.json", json.dumps({"step": step}))
        write_shards(optimizer, part / "optimizer")
    if processes.rank() == 0:
        for old in runlog.checkpoints(folder):
            if old != final:
                runlog.remove(old)


def write_shards(optimizer: Optimizer, folder: Path) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            save_shards(optimizer.tensors(), storage_writer=writer)
        except CheckpointException as error:  # derives from BaseException
            raise OperationFailed(first_of(error)) from error


def resume(folder: Path, pair: Pair, moving_teacher: bool) -> int:
    """Load the weights of the last checkpoint, drop the rows after it; returns the first step.

    The optimizer follows (`resume_optimizer`), once the weights are where they will stay.
    """
    found = runlog.checkpoints(folder)
    step = 0
    if found:
        step = json.loads((found[-1] / "state.json").read_text())["step"]
        load_weights(pair.student.network, found[-1])
        if moving_teacher:
            load_model(pair.teacher.network, found[-1] / "teacher.safetensors")
    processes.barrier()  # all have read
    if processes.rank() == 0:
        runlog.rewind(folder / "rows.jsonl", lambda row: row["step"] < step)
        runlog.rewind(folder / "evals.jsonl", lambda row: bool(found) and row["step"] <= step)
        for dump in (folder / "batches").glob("step_*.safetensors"):
            if int(dump.stem.removeprefix("step_")) >= step:
                dump.unlink()
    processes.barrier()
    return step


def resume_optimizer(folder: Path, optimizer: Optimizer) -> None:
    """Load the optimizer of the last checkpoint, if there is one, into this one's tensors."""
    found = runlog.checkpoints(folder)
    if not found:
        return
    reader = HuggingFaceStorageReader(str(found[-1] / "optimizer"))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            load_shards(optimizer.tensors(), storage_reader=reader)
        except CheckpointException as error:
            raise OperationFailed(
                f"could not read {found[-1] / 'optimizer'}: {first_of(error)}"
            ) from error


def first_of(error: CheckpointException) -> str:
    """What went wrong in the first process in which something did, on one line."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"process {rank}: {type(cause).__name__}: {cause}"


def load_weights(network: Any, checkpoint: Path) -> None:
    """Copy a checkpoint's weights, or its adapters, into the network, exactly."""
    if hasattr(network, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(network, load_peft_weights(str(checkpoint), device="cpu"))
        return
    saved = type(network).from_pretrained(checkpoint, dtype=network.dtype)
    network.load_state_dict(saved.state_dict())
