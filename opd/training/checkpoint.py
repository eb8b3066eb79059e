"""Checkpoints: everything that a run needs to go on to the same bits, written whole or not at all.

A folder step_N holds the student as Hugging Face and peft save it, the optimizer with its masters,
the teacher if it moves, the number of steps done, and a list of these files (`opd.runtime.manifest`). The
optimizer's tensors are safetensors files of torch.distributed.checkpoint, to which every process
writes its part; any number of processes, sharded or not, can read them. The last two are kept.
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
from diagnostics.io.atomic import sync, write_text
from diagnostics.records import rows
from opd.models.fsdp import plain
from opd.runtime import distributed
from opd.runtime.manifest import write_manifest
from opd.runtime.staged_folders import checkpoints, remove, whole_folder
from opd.teachers.pair import ModelPair
from opd.training.optimizer import Optimizer

KEPT = 2
"""Checkpoints that are kept: the last one, and one before it in case the last is damaged."""


def save(
    folder: Path, pair: ModelPair, optimizer: Optimizer, step: int, moving_teacher: bool
) -> None:
    """Write checkpoints/step_N, then remove all but the last two. Every process has to call.

    The rows that lead to it are on the disk before it is.
    """
    final = folder / "checkpoints" / f"step_{step:06d}"
    network = plain(pair.student)
    if distributed.rank() == 0:
        for record in (folder / "rows.jsonl", folder / "evals.jsonl"):
            if record.exists():
                sync(record)
    with whole_folder(final) as part:
        if distributed.rank() == 0:
            network.save_pretrained(part)
            pair.tokenizer.save_pretrained(part)
            if moving_teacher:
                save_model(pair.teacher.network, str(part / "teacher.safetensors"))
        write_shards(optimizer, part / "optimizer")
        distributed.barrier()
        if distributed.rank() == 0:
            evaluations = len(rows.read(folder / "evals.jsonl"))
            state = {"step": step, "evaluations": evaluations}
            write_text(part / "state.json", json.dumps(state))
            write_manifest(part)
    if distributed.rank() == 0:
        for old in checkpoints(folder)[:-KEPT]:
            remove(old)


def write_shards(optimizer: Optimizer, folder: Path) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            save_shards(optimizer.tensors(), storage_writer=writer)
        except CheckpointException as error:  # derives from BaseException
            raise OperationFailed(first_of(error)) from error


def load(checkpoint: Path, pair: ModelPair, moving_teacher: bool) -> None:
    """Load the weights of a checkpoint.

    The optimizer follows (`load_optimizer`), once the weights are where they will stay.
    """
    load_weights(pair.student.network, checkpoint)
    if moving_teacher:
        load_model(pair.teacher.network, checkpoint / "teacher.safetensors")


def load_optimizer(checkpoint: Path, optimizer: Optimizer) -> None:
    """Load a checkpoint's optimizer into this one's tensors."""
    reader = HuggingFaceStorageReader(str(checkpoint / "optimizer"))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            load_shards(optimizer.tensors(), storage_reader=reader)
        except CheckpointException as error:
            raise OperationFailed(
                f"could not read {checkpoint / 'optimizer'}: {first_of(error)}"
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
