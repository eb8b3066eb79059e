"""Checkpoints: everything that a run needs to go on to the same bits, written whole or not at all.

A folder step_N holds the student as Hugging Face and peft save it, the optimizer with its masters,
the teacher if it moves, and the number of steps done.
"""

import json
from pathlib import Path
from typing import Any

import torch

from opd import runlog
from opd.model import Pair
from opd.optimizer import Optimizer


def save(folder: Path, pair: Pair, optimizer: Optimizer, step: int, moving_teacher: bool) -> None:
    """Write checkpoints/step_N, then remove older ones."""
    final = folder / "checkpoints" / f"step_{step:06d}"
    with runlog.whole_folder(final) as part:
        pair.student.network.save_pretrained(part)
        pair.tokenizer.save_pretrained(part)
        torch.save(optimizer.state_dict(), part / "optimizer.pt")
        if moving_teacher:
            torch.save(pair.teacher.network.state_dict(), part / "teacher.pt")
        runlog.write_text(part / "state.json", json.dumps({"step": step}))
    for old in runlog.checkpoints(folder):
        if old != final:
            runlog.remove(old)


def resume(folder: Path, pair: Pair, optimizer: Optimizer, moving_teacher: bool) -> int:
    """Load the last checkpoint, drop the rows after it; returns the first step to run."""
    found = runlog.checkpoints(folder)
    step = 0
    if found:
        step = json.loads((found[-1] / "state.json").read_text())["step"]
        load_weights(pair.student.network, found[-1])
        optimizer.load_state_dict(torch.load(found[-1] / "optimizer.pt", weights_only=True))
        if moving_teacher:
            state = torch.load(found[-1] / "teacher.pt", weights_only=True)
            pair.teacher.network.load_state_dict(state)
    runlog.rewind(folder / "rows.jsonl", lambda row: row["step"] < step)
    runlog.rewind(folder / "evals.jsonl", lambda row: bool(found) and row["step"] <= step)
    for dump in (folder / "batches").glob("step_*.safetensors"):
        if int(dump.stem.removeprefix("step_")) >= step:
            dump.unlink()
    return step


def load_weights(network: Any, checkpoint: Path) -> None:
    """Copy a checkpoint's weights, or its adapters, into the network, exactly."""
    if hasattr(network, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(network, load_peft_weights(str(checkpoint), device="cpu"))
        return
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=network.dtype)
    network.load_state_dict(saved.state_dict())
