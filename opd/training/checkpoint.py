"""Save and load checkpoints, so that a resumed run is bit-identical to an uninterrupted one.

A folder step_N holds the student in the Hugging Face (or peft) format, the optimizer state with its
float32 master weights, the teacher if it is updated during training, the number of completed steps,
and a manifest of these files (`opd.runtime.manifest`). The optimizer tensors are safetensors files
of torch.distributed.checkpoint: every rank writes its shard, and any number of ranks, with or
without FSDP, can read them. A checkpoint is written atomically; the last two are kept.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
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
from opd.models.fsdp import gather_network
from opd.runtime import distributed
from opd.runtime.manifest import write_manifest
from opd.runtime.staged_folders import list_checkpoints, remove_folder, staged_folder
from opd.teachers.pair import ModelPair
from opd.training.optimizer import Optimizer

NUM_CHECKPOINTS_KEPT = 2
"""Number of checkpoints to keep: the last one, and a fallback in case the last is damaged."""


def save(folder: Path, pair: ModelPair, optimizer: Optimizer, step: int) -> None:
    """Write checkpoints/step_N and remove all but the last two checkpoints.

    Every rank must call this function. The rows up to this step are flushed to disk first.

    Args:
        folder: Run folder.
        pair: Student and teacher.
        optimizer: Optimizer whose state is saved.
        step: Number of completed steps.
    """
    target = folder / "checkpoints" / f"step_{step:06d}"
    network = gather_network(pair.student)
    if distributed.rank() == 0:
        for record_file in (folder / "rows.jsonl", folder / "evals.jsonl"):
            if record_file.exists():
                sync(record_file)
    with staged_folder(target) as partial_folder:
        if distributed.rank() == 0:
            network.save_pretrained(partial_folder)
            pair.tokenizer.save_pretrained(partial_folder)
            pair.teacher.save(partial_folder)
        save_optimizer_shards(optimizer, partial_folder / "optimizer")
        distributed.barrier()
        if distributed.rank() == 0:
            evaluations = len(rows.read_rows(folder / "evals.jsonl"))
            state = {"step": step, "evaluations": evaluations}
            write_text(partial_folder / "state.json", json.dumps(state))
            write_manifest(partial_folder)
    if distributed.rank() == 0:
        for expired in list_checkpoints(folder)[:-NUM_CHECKPOINTS_KEPT]:
            remove_folder(expired)


def save_optimizer_shards(optimizer: Optimizer, folder: Path) -> None:
    """Write this rank's shard of the optimizer state.

    Args:
        optimizer: Optimizer whose state is saved.
        folder: Folder that receives one safetensors file per rank.

    Raises:
        OperationFailed: A rank could not write its shard.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            save_shards(optimizer.state_tensors(), storage_writer=writer)
        except CheckpointException as error:  # derives from BaseException
            raise OperationFailed(describe_failure(error)) from error


def load(checkpoint: Path, pair: ModelPair) -> None:
    """Load the model weights of a checkpoint.

    Call `load_optimizer` afterwards, once the weights are in their final place (device, FSDP).

    Args:
        checkpoint: Folder of the checkpoint.
        pair: Student and teacher, overwritten in place.
    """
    load_weights(pair.student.network, checkpoint)
    pair.teacher.load(checkpoint)


def load_optimizer(checkpoint: Path, optimizer: Optimizer) -> None:
    """Load the optimizer state of a checkpoint into an optimizer.

    Args:
        checkpoint: Folder of the checkpoint.
        optimizer: Optimizer whose tensors are overwritten.

    Raises:
        OperationFailed: A rank could not read the files.
    """
    reader = HuggingFaceStorageReader(str(checkpoint / "optimizer"))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            load_shards(optimizer.state_tensors(), storage_reader=reader)
        except CheckpointException as error:
            raise OperationFailed(
                f"could not read {checkpoint / 'optimizer'} ({describe_failure(error)}); restore "
                "the checkpoint, or move it away to resume from an earlier one"
            ) from error


def describe_failure(error: CheckpointException) -> str:
    """Return the error of the first rank that failed, on one line."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def load_weights(network: Any, checkpoint: Path) -> None:
    """Copy the weights (or the LoRA adapters) of a checkpoint into a network, bit for bit."""
    if hasattr(network, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(network, load_peft_weights(str(checkpoint), device="cpu"))
        return
    saved = type(network).from_pretrained(checkpoint, dtype=network.dtype)
    network.load_state_dict(saved.state_dict())
