"""Train: roll out, score with the teacher, update; straight from top to bottom.

A step depends on (config, weights, optimizer, step) alone: prompts and random numbers are derived
from (seed, step). So a run that was killed continues from its last checkpoint as if it never was.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from diagnostics.batch import Rollouts
from diagnostics.monitor import Monitor
from diagnostics.rows import Row, append
from opd import runlog
from opd.config import Config
from opd.data import Task, encode, load_task
from opd.evaluate import evaluate, grade_responses
from opd.model import Pair, load_pair, loss_from_hidden, micro_batches, response_hidden, score
from opd.objectives import DENOMINATORS, Objective, make
from opd.problems import Problem
from opd.rollout import sample

ROLLOUT, EVALUATION = 0, 1


def train(config: Config) -> Path:
    """Run (or resume) `config`; returns the run folder. The trained model is in `final/`."""
    objective = make(config.objective, config.gamma)
    if config.denominator not in DENOMINATORS:
        known = ", ".join(DENOMINATORS)
        raise ValueError(f"unknown denominator {config.denominator!r}; known: {known}")
    with runlog.open_run(config) as folder:
        task = load_task(config.task, config.seed)
        pair = load_pair(config.student, config.teacher, config.device, config.dtype)
        optimizer = torch.optim.AdamW(
            pair.student.network.parameters(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        first = resume(folder, pair, optimizer)
        monitor = Monitor()
        if first == 0:
            record_evaluation(folder, config, pair, task, 0)
        bar = tqdm(
            range(first, config.steps),
            initial=first,
            total=config.steps,
            desc=f"{folder.name} {config.objective}",
            disable=None,
        )
        for step in bar:
            row = one_step(config, folder, pair, task, objective, optimizer, monitor, step)
            append(folder / "rows.jsonl", row)
            bar.set_postfix(
                reward=f"{row['collapse/reward']:.2f}",
                kl=f"{row['drift/reverse_kl']:.3f}",
                grad=f"{row['grad_norm']:.2f}",
                length=f"{row['collapse/length']:.0f}",
            )
            done = step + 1
            if due(done, config.eval_every) or done == config.steps:
                record_evaluation(folder, config, pair, task, done)
            if due(done, config.save_every) or done == config.steps:
                save_checkpoint(folder, pair, optimizer, done)
        if first < config.steps or not (folder / "final").exists():
            with runlog.whole_folder(folder / "final") as part:
                pair.student.network.save_pretrained(part)
                pair.tokenizer.save_pretrained(part)
    return folder


def one_step(
    config: Config,
    folder: Path,
    pair: Pair,
    task: Task,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    monitor: Monitor,
    step: int,
) -> Row:
    """One optimizer step on fresh rollouts; returns its row of numbers."""
    clock = [time.perf_counter()]
    generator = torch.Generator().manual_seed(derive(config.seed, step, ROLLOUT))
    problems = task.train(step, config.prompts_per_step)
    prompts = encode(pair.tokenizer, problems, config.group_size, config.max_prompt)
    rollouts = sample(
        pair.student,
        prompts,
        pair.eos,
        max_response=config.max_response,
        temperature=config.temperature,
        top_p=config.top_p,
        generator=generator,
    )
    rollouts = graded(pair, task, prompts.answers, rollouts)
    prompts = prompts.to(pair.student.device)
    clock.append(time.perf_counter())

    scored, teacher_hidden = score(
        pair,
        prompts,
        rollouts,
        k=config.support_k,
        source="student" if objective.support == "student" else "teacher",
        temperature=config.temperature,
        micro_tokens=config.micro_tokens,
        chunk_elements=config.chunk_elements,
        keep_teacher=objective.support == "full",
    )
    clock.append(time.perf_counter())

    denominator = DENOMINATORS[config.denominator](scored)
    credit, ratio = objective.credit(scored), objective.ratio(scored)
    slot = (scored.mask.flatten().cumsum(0) - 1).reshape(scored.mask.shape)
    rate = config.lr * min(1.0, (step + 1) / (config.warmup + 1))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=scored.tokens.device)
    for rows in micro_batches(prompts, scored, config.micro_tokens):
        part = scored.rows(rows).trimmed()
        width = part.mask.shape[1]
        where = slot[rows][:, :width][part.mask]
        partial = loss_from_hidden(
            pair,
            objective,
            response_hidden(pair.student, prompts.rows(rows), part),
            None if teacher_hidden is None else teacher_hidden[where],
            part,
            credit[rows][:, :width],
            (ratio[rows] / denominator[rows, None])[:, :width][part.mask],
            chunk_elements=config.chunk_elements,
        )
        partial.backward()
        loss = loss + partial.detach()
    parameters = pair.student.network.parameters()
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
    finite = bool(norm.isfinite())
    if finite:
        optimizer.step()
    clock.append(time.perf_counter())

    row: Row = {"step": step}
    row |= monitor(step, [scored], loss=loss, grad_norm=norm, lr=rate, skipped=float(not finite))
    if due(step, config.batch_every):
        scored.save(folder / "batches" / f"step_{step:06d}.safetensors")
    clock.append(time.perf_counter())
    for name, a, b in zip(("rollout", "score", "update", "record"), clock, clock[1:], strict=False):
        row[f"seconds/{name}"] = b - a
    return row


def graded(pair: Pair, task: Task, answers: list[str], rollouts: Rollouts) -> Rollouts:
    """The rollouts with the outcome reward of each response."""
    problems = [Problem(prompt="", answer=answer) for answer in answers]
    verdicts = grade_responses(pair.tokenizer, rollouts.tokens, rollouts.mask, problems, task.grade)
    return replace(rollouts, reward=torch.tensor(verdicts, device=rollouts.tokens.device))


def record_evaluation(folder: Path, config: Config, pair: Pair, task: Task, step: int) -> None:
    """Append the held-out accuracy after `step` optimizer steps to evals.jsonl."""
    generator = torch.Generator().manual_seed(derive(config.seed, step, EVALUATION))
    found = evaluate(
        pair.student,
        pair.tokenizer,
        pair.eos,
        task,
        problems=config.eval_problems,
        max_prompt=config.max_prompt,
        max_response=config.max_response,
        temperature=1.0,
        generator=generator,
    )
    append(folder / "evals.jsonl", {"step": step, **found})
    tqdm.write(
        f"step {step}: accuracy {found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}] "
        f"on {found['problems']} held-out problems",
        file=sys.stderr,
    )


def save_checkpoint(folder: Path, pair: Pair, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write checkpoints/step_N whole, then remove older ones."""
    final = folder / "checkpoints" / f"step_{step:06d}"
    with runlog.whole_folder(final) as part:
        pair.student.network.save_pretrained(part)
        pair.tokenizer.save_pretrained(part)
        torch.save(optimizer.state_dict(), part / "optimizer.pt")
        runlog.write_text(part / "state.json", json.dumps({"step": step}))
    for old in runlog.checkpoints(folder):
        if old != final:
            runlog.remove(old)


def resume(folder: Path, pair: Pair, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint, drop the rows after it; returns the first step to run."""
    found = runlog.checkpoints(folder)
    step = 0
    if found:
        step = json.loads((found[-1] / "state.json").read_text())["step"]
        load_weights(pair, found[-1])
        state = torch.load(found[-1] / "optimizer.pt", weights_only=True)
        optimizer.load_state_dict(state)
    runlog.rewind(folder / "rows.jsonl", lambda row: row["step"] < step)
    runlog.rewind(folder / "evals.jsonl", lambda row: bool(found) and row["step"] <= step)
    for dump in (folder / "batches").glob("step_*.safetensors"):
        if int(dump.stem.removeprefix("step_")) >= step:
            dump.unlink()
    return step


def load_weights(pair: Pair, checkpoint: Path) -> None:
    """Copy a checkpoint's weights into the student, exactly."""
    from transformers import AutoModelForCausalLM

    network = pair.student.network
    saved = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=network.dtype)
    network.load_state_dict(saved.state_dict())


def derive(*words: int) -> int:
    """A 62-bit seed from integers, different for every tuple (splitmix64 rounds)."""
    state = 0
    for word in words:
        state = (state ^ word) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 2


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
