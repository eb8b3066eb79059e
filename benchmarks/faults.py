"""Test the alarms: real runs of a tiny pair, each with one injected fault, and healthy runs.

    python -m benchmarks.faults [--steps 5 --folder DIR --only WORD]

Prints which check or which rule of `diagnostics.alarms.alarms` detected each fault and when, and
how many of sixty healthy runs of twelve architectures raised an alarm. The outcome of each run is
written to DIR/results.jsonl when it ends; the same command resumes from there. The pairs are
random: a student is its teacher with noise on the weights, so that it can learn and responses end.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.healthy import healthy_runs
from benchmarks.injected import SAMPLING_FAULTS, Fault
from benchmarks.silent import SILENT_FAULTS
from diagnostics.alarms.alarms import Alarm, replay
from diagnostics.alarms.rules import RULES
from diagnostics.errors import InvalidInput
from diagnostics.records import rows
from diagnostics.records.rows import Row
from opd.config.settings import Config, with_settings
from opd.lab.build import make_tokenizer
from opd.training import train

FAULTS: dict[str, Fault] = {**SAMPLING_FAULTS, **SILENT_FAULTS}
HEALTHY_STEPS = 8
CLOSER = {"mixtral": 0.3, "granite": 0.5}
"""Factors on the noise, by architecture.

In these architectures little noise makes a student confident in tokens that its teacher excludes:
it exchanges experts, or the residual branches have more weight.
"""
UNTIED = {"tie_word_embeddings": False}


def make_models(folder: Path, noise: float = 0.1, architecture: str = "qwen2") -> tuple[str, str]:
    """Save a random teacher, and a student that is the teacher with noise on its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    noise *= CLOSER.get(architecture, 1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = AutoConfig.for_model(architecture, **model_settings(architecture))
        network = AutoModelForCausalLM.from_config(settings)
        sharpen(network)
        network.generation_config.eos_token_id = list(range(20))  # so that responses end
        for name in ("teacher", "student"):
            network.save_pretrained(folder / name)
            make_tokenizer().save_pretrained(folder / name)
            for weight in network.parameters():
                weight.data += noise * 0.3 * torch.randn_like(weight) * (weight.dim() > 1)
    return str(folder / "student"), str(folder / "teacher")


def sharpen(network: Any) -> None:
    """Make a random network as confident as a language model, by its head or, if tied, its layers.

    A tied head that is scaled up repeats the previous token.
    """
    head = network.get_output_embeddings().weight
    if head is not network.get_input_embeddings().weight:
        head.data *= 3
        return
    for weight in network.parameters():
        if weight.dim() > 1 and weight is not head:
            weight.data *= 2


def model_settings(architecture: str) -> dict[str, Any]:
    """Return the settings of a tiny model of an architecture; Gemma models have tied heads."""
    size = len(make_tokenizer())
    common: dict[str, Any] = {"vocab_size": size, "initializer_range": 0.3}
    if architecture == "gpt2":
        return common | {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, **UNTIED}
    common |= {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": architecture.startswith("gemma"),
    }
    if architecture == "phi3":
        return common | {"pad_token_id": 0}
    return common


def run_settings(pair: tuple[str, str], out: Path, seed: int, steps: int) -> dict[str, Any]:
    """Return the settings of a short run on the toy task."""
    return {
        "student": pair[0],
        "teacher": pair[1],
        "out": str(out),
        "seed": seed,
        "steps": steps,
        "objective": "full_reverse_kl",
        "prompts_per_step": 6,
        "group_size": 2,
        "max_prompt": 64,
        "max_response": 16,
        "lr": 1e-3,
        "support_k": 8,
        "eval_every": 0,
        "eval_problems": 1,
        "save_every": 0,
        "save_batch_every": 0,
        "device": "cpu",
    }


def record_rows(pair: tuple[str, str], out: Path, seed: int, steps: int, fault: Fault) -> list[Row]:
    """Return the rows of a run with the fault, up to its failure if it fails."""
    with suppress(ValueError):  # diverged weights end the run
        run_with_fault(pair, out, seed, steps, fault)
    return rows.read_rows(out / "rows.jsonl")


def run_with_fault(pair: tuple[str, str], out: Path, seed: int, steps: int, fault: Fault) -> None:
    """Train with the fault.

    Args:
        pair: Folders of student and teacher.
        out: Run folder.
        seed: Seed of the run.
        steps: Number of steps.
        fault: The fault.

    Raises:
        ValueError: If the run was refused, or failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    prepared = fault.prepare(out, pair)
    settings = run_settings(pair, out, seed, steps) | dict(fault.settings) | dict(prepared)
    with fault.patched():
        train.train(with_settings(Config(student="", teacher="", out=""), **settings))


def run_outcome(pair: tuple[str, str], out: Path, steps: int, fault: Fault) -> dict[str, Any]:
    """Return how a run was flagged: {"refused": error or "", "alarms": {rule: first step}}."""
    refused = ""
    try:
        run_with_fault(pair, out, 0, steps, fault)
    except InvalidInput as error:
        refused = str(error)
    first: dict[str, int] = {}
    for alarm in replay(rows.read_rows(out / "rows.jsonl")):
        first.setdefault(alarm.rule.name, alarm.step)
    return {"refused": refused, "alarms": first}


def format_alarms(alarms_by_fault: Mapping[str, list[Alarm]]) -> str:
    """Return a table of faults with the step at which each rule first raised an alarm."""
    lines = ["| fault | caught by, at step |", "|---|---|"]
    for fault, alarms in alarms_by_fault.items():
        first: dict[str, int] = {}
        for alarm in alarms:
            first.setdefault(alarm.rule.name, alarm.step)
        lines.append(f"| {fault} | {format_first_steps(first)} |")
    return "\n".join(lines)


def format_first_steps(first: Mapping[str, int]) -> str:
    """Return the rules and their first steps as text, in order of the steps."""
    order = sorted(first, key=lambda name: first[name])
    return ", ".join(f"{name} {first[name]}" for name in order) or "-"


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the faults and what detected each, refusals first."""
    lines = ["| fault | caught by, at step |", "|---|---|"]
    for name in FAULTS:
        if name in results:
            result = results[name]
            start = result["refused"].split(":")[0]
            detections = ([f"refused: {start}"] if start else []) + (
                [format_first_steps(result["alarms"])] if result["alarms"] or not start else []
            )
            lines.append(f"| {name} | {'; '.join(detections)} |")
    return "\n".join(lines)


def format_verdict(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the undetected faults, and the alarms of healthy runs."""
    missed = [n for n in FAULTS if n in results and not any(results[n].values())]
    healthy = [name for name in healthy_runs() if name in results]
    wrong = [name for name in healthy if any(results[name].values())]
    lines = [f"{len(missed)} undetected faults: {', '.join(missed) or 'none'}"]
    lines += [f"{name}: {results[name]}" for name in wrong]
    lines.append(
        f"{len(wrong)} of {len(healthy)} healthy runs of {HEALTHY_STEPS} steps were refused or "
        f"raised an alarm; {len(RULES)} rules"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="steps of a run with a fault")
    parser.add_argument("--folder", type=Path, help="folder of results.jsonl; default: temporary")
    parser.add_argument("--only", default="", help="run only those with this word in their name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "results.jsonl"
        results = {row.pop("name"): row for row in map(json.loads, read_lines(path))}
        pairs: dict[str, tuple[str, str]] = {}
        faults = {fault: (definition, args.steps) for fault, definition in FAULTS.items()}
        for run, (architecture, changes) in healthy_runs().items():
            faults[run] = (Fault(settings=changes, architecture=architecture), HEALTHY_STEPS)
        for number, (run, (fault, steps)) in enumerate(faults.items()):
            if run in results or args.only not in run:
                continue
            kind = fault.architecture
            if kind not in pairs:
                pairs[kind] = make_models(Path(name) / "models" / kind, architecture=kind)
            results[run] = run_outcome(pairs[kind], Path(name) / f"run-{number}", steps, fault)
            with path.open("a") as file:
                file.write(json.dumps({"name": run, **results[run]}) + "\n")
    print(format_table(results))
    print(format_verdict(results))


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file, or none if it does not exist."""
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
