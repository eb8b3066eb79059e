"""Toy models: teachers and a weaker student, trained from scratch on verifiable tasks.

Causal language models with one tokenizer, trained by next-token prediction on worked solutions of
`opd.data.chain_task` and `opd.data.sort_task`, or on turns of games of `opd.lab.household_demos`:
correct ones for a teacher, ones with errors for the smaller student. They are saved as ordinary
Hugging Face folders. Training takes minutes on two CPU cores, one for each model; the same settings
give identical weights on the same machine, and a pair is built only once.

In the default pair, teacher and student have the same writing style. The mismatched models
reproduce common failures on purpose: a student of two tasks that spells its tags in bytes and ends
with <|im_end|>; a teacher of the first task whose tags are special tokens and whose end token is
<|endoftext|>; a teacher of the second task that writes like the student; and repetition loops in
the training data of all of them.
"""

import dataclasses
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput
from diagnostics.io.atomic import write_text
from diagnostics.records.renamed import present_lab_settings
from opd.data import chain_task, sort_task
from opd.lab import household_demos, shown_solutions
from opd.lab.configs import LabConfig, ToyModelConfig
from opd.lab.networks import make_network
from opd.lab.problem_files import (
    HOUSEHOLD_SOURCE,
    HeldOutSource,
    message_sources,
    sorting_source,
    write_held_out_problems,
    write_sorting_problems,
    write_training_problems,
)
from opd.lab.training_loop import optimise, row_parts
from opd.lab.writing_style import UNLABELLED, encode_solution
from opd.runtime.seeds import derive_seed
from opd.runtime.staged_folders import staged_folder

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


TASKS = {
    "chain": chain_task,
    "sort": sort_task,
    "household": household_demos,
    "shown": shown_solutions,
}
"""Modules with `problems(split, count, seed)` and `corrupted_solution(prompt, rate, generator)`."""
SOURCES: dict[str, Callable[[Path], list[HeldOutSource]]] = {
    "chain": lambda _: [HeldOutSource("chain")],
    "sort": sorting_source,
    "household": lambda _: [HOUSEHOLD_SOURCE],
    "shown": message_sources,
}
"""Task to the held-out problems on which a model of it is evaluated, whose files go to a folder."""
VOCABULARY_SIZE = 512
"""Vocabulary size of models for games, whose prompts are long in bytes."""


def build(folder: Path, config: LabConfig, jobs: int = 1) -> tuple[Path, Path]:
    """Build the models of a configuration, unless they exist.

    Args:
        folder: The folder of the models.
        config: The configuration.
        jobs: Number of models trained in parallel.

    Returns:
        The folders of the student and of the teacher.

    Raises:
        InvalidInput: `folder` holds models with other settings; the message lists the differences.
    """
    import joblib

    settings = recorded_settings(config)
    config_file = folder / "lab.json"
    if config_file.exists():
        previous_settings = present_lab_settings(json.loads(config_file.read_text())["settings"])
        changed_names = [
            k
            for k in sorted(settings.keys() | previous_settings.keys())
            if settings.get(k) != previous_settings.get(k)
        ]
        if changed_names:
            differences = ", ".join(
                f"{k}: {previous_settings.get(k)} -> {settings.get(k)}" for k in changed_names
            )
            raise InvalidInput(
                f"{folder} holds models with other settings ({differences}); choose another --out"
            )
        return folder / "student", folder / "teacher"
    offsets = {name: offset for offset, name in enumerate(config.models)}
    results: dict[str, Any] = {}
    for has_start in (False, True):
        names = [name for name, model in config.models.items() if bool(model.start) == has_start]
        jobs_to_run = (
            joblib.delayed(build_model)(folder, config, offsets[name], name) for name in names
        )
        results |= zip(names, joblib.Parallel(n_jobs=jobs)(jobs_to_run), strict=True)
    if "sort" in config.student.tasks:
        write_sorting_problems(folder / "sort.jsonl")
    if "shown" in config.student.tasks:
        write_held_out_problems(folder)
        write_training_problems(folder, derive_seed(config.seed, len(results)))
    write_text(config_file, json.dumps({"settings": settings, **results}, indent=1))
    return folder / "student", folder / "teacher"


def recorded_settings(config: LabConfig) -> dict[str, Any]:
    """Return a configuration as JSON, without the fields that older records lack if unset."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    for model in (settings["teacher"], settings["student"], *(x for _, x in settings["others"])):
        for name in ("start", "previous_token_head"):
            if not model[name]:
                del model[name]
    return settings


def build_model(folder: Path, config: LabConfig, offset: int, name: str) -> dict[str, Any]:
    """Train one model on one thread and save it.

    Args:
        folder: The folder of all models.
        config: The configuration.
        offset: Number of the model, from which its seed is derived.
        name: Name of the model and of its folder.

    Returns:
        Held-out accuracy by task ("tasks") and the time in "seconds".
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    start_time, threads = time.perf_counter(), torch.get_num_threads()
    # one thread fixes the order of summation, so results do not depend on the load
    torch.set_num_threads(1)
    try:
        model_config = config.models[name]
        tokenizer = make_tokenizer(model_config.habit.end, config.texts)
        seed = derive_seed(config.seed, offset)
        start = folder / model_config.start if model_config.start else None
        network = train_model(tokenizer, model_config, seed, name, offset, start)
        with staged_folder(folder / name) as partial_folder:
            network.save_pretrained(partial_folder)
            tokenizer.save_pretrained(partial_folder)
        accuracies = held_out_accuracy(folder / name, model_config.tasks, config.held_out)
    finally:
        torch.set_num_threads(threads)
    seconds = round(time.perf_counter() - start_time, 1)
    line_format = "{accuracy:.3f} [{low:.3f}, {high:.3f}] on {problems} held-out problems"
    for task, accuracy in accuracies.items():
        print(f"{name}: {task} accuracy {line_format.format(**accuracy)}", file=sys.stderr)
    return {"tasks": accuracies, "seconds": seconds}


def make_tokenizer(end: str = "<|im_end|>", texts: Sequence[str] = ()) -> Any:
    """Build a tokenizer with one token per byte, special tokens and a chat template.

    A Qwen2Tokenizer, because AutoTokenizer loads any tokenizer next to a Qwen2 model as one:
    another class would split text differently after it is loaded from disk.

    Args:
        end: The EOS token.
        texts: Texts whose frequent words become tokens too, VOCABULARY_SIZE in all; digits stay
            single.

    Returns:
        The tokenizer.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    names = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=[],
        eos_token=end,
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    )
    if texts:
        tokenizer = tokenizer.train_new_from_iterator(texts, VOCABULARY_SIZE, show_progress=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def train_model(
    tokenizer: Any,
    model_config: ToyModelConfig,
    seed: int,
    name: str,
    bar_position: int = 0,
    start: Path | None = None,
) -> Any:
    """Train a model by next-token prediction on the responses of fresh training problems.

    Args:
        tokenizer: The tokenizer.
        model_config: Configuration of the model.
        seed: Seed of weights and data.
        name: Name for the progress bar.
        bar_position: Line of the progress bar.
        start: Folder of a model whose weights are trained further; None for new weights.

    Returns:
        The trained model in evaluation mode.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if start is None:
        network = new_model(model_config, seed, tokenizer)
    else:
        network = AutoModelForCausalLM.from_pretrained(start).train()
    learns_prompts = bool({"household", "shown"} & set(model_config.tasks))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=model_config.lr, betas=(0.9, 0.98), weight_decay=0.01
    )

    def add_step_gradient(step: int) -> float:
        ids, labels = make_training_batch(tokenizer, model_config, derive_seed(seed, step))
        return add_gradient(network, ids, labels, tokenizer.pad_token_id, learns_prompts)

    return optimise(network, [optimizer], model_config.steps, add_step_gradient, name, bar_position)


def add_gradient(
    network: Any,
    ids: "torch.Tensor",
    labels: "torch.Tensor",
    padding: int,
    learns_prompts: bool,
) -> float:
    """Add the gradient of the mean next-token loss of a batch, in parts of `row_parts`.

    Args:
        network: The model.
        ids: (B, L) ids, padded on the right.
        labels: (B, L) labels, UNLABELLED where nothing is learned.
        padding: Id of the padding token.
        learns_prompts: Whether the mean loss of the prompts is added.

    Returns:
        The loss in nats per token.
    """
    import torch

    # Observations repeat their words, so copying is learned from them long before it is learned
    # from the few words of an action
    prompt_labels = torch.where((labels == UNLABELLED) & (ids != padding), ids, UNLABELLED)
    parts = [labels, prompt_labels] if learns_prompts else [labels]
    counts = [(x[:, 1:] != UNLABELLED).sum() for x in parts]
    present = (ids != padding) | (labels != UNLABELLED)  # a labelled EOS may be the padding token
    total = 0.0
    for rows, width in row_parts(present):
        logits = network(input_ids=ids[rows, :width]).logits[:, :-1].flatten(0, 1)
        losses = [
            torch.nn.functional.cross_entropy(
                logits, x[rows, 1:width].flatten(), ignore_index=UNLABELLED, reduction="sum"
            )
            / count
            for x, count in zip(parts, counts, strict=True)
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        total += loss.item()
    return total


def new_model(model_config: ToyModelConfig, seed: int, tokenizer: Any) -> Any:
    """Initialise a Qwen2 model from `seed` without changing the caller's random state."""
    network = make_network(
        model_config.layers,
        model_config.width,
        tokenizer,
        seed,
        previous_token_head=model_config.previous_token_head,
    )
    if model_config.habit.foreign or model_config.habit.read:  # both end tokens occur in its data
        end_tokens = [tokenizer.eos_token, model_config.habit.opposite.end]
        network.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(end_tokens)
    return network


def make_training_batch(
    tokenizer: Any, model_config: ToyModelConfig, seed: int
) -> "tuple[torch.Tensor, torch.Tensor]":
    """Encode worked problems, padded on the right; only responses are labelled.

    Args:
        tokenizer: The tokenizer.
        model_config: Configuration of the model.
        seed: Seed of the problems.

    Returns:
        Ids and labels, both (B, L).
    """
    import torch

    rows, generator = [], random.Random(seed)
    rows_per_task = model_config.batch // len(model_config.tasks)
    for name in dict.fromkeys(model_config.tasks):
        task = TASKS[name]
        for problem in task.problems("train", rows_per_task * model_config.tasks.count(name), seed):
            message = [{"role": "user", "content": problem.prompt}]
            prompt = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False
            )
            solution = task.corrupted_solution(problem.prompt, model_config.careless, generator)
            rows.append(
                (
                    tokenizer.encode(prompt),
                    *encode_solution(tokenizer, solution, model_config.habit, generator),
                )
            )
    width = max(len(prompt) + len(response) for prompt, response, _ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), UNLABELLED)
    for i, (prompt, response, response_labels) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[i, :end] = torch.tensor(prompt + response)
        labels[i, len(prompt) : end] = torch.tensor(response_labels)
    return ids, labels


def held_out_accuracy(model: Path, tasks: tuple[str, ...], count: int) -> dict[str, Any]:
    """Evaluate a saved model at temperature 1 on held-out problems of each task.

    Args:
        model: Folder of the model.
        tasks: Names in TASKS.
        count: Number of problems of each.

    Returns:
        Results by task; for problems that show solutions, by kind of message.
    """
    from opd.config.groups import EvalConfig, GamesConfig
    from opd.evaluation.folder import evaluate_folder

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = [source for name in dict.fromkeys(tasks) for source in SOURCES[name](folder)]
        results = {
            source.name: evaluate_folder(
                str(model),
                source.task,
                device="cpu",
                evaluation=EvalConfig(
                    eval_problems=count,
                    eval_task=source.eval_task,
                    eval_prompt_column=source.prompt_column,
                ),
                games=GamesConfig(max_turns=household_demos.MAX_TURNS),
                max_prompt=source.max_prompt,
                max_response=source.max_response,
                seed=0,
            )
            for source in sources
        }
    return {
        name: {k: v for k, v in result.items() if k != "outcomes"}
        for name, result in results.items()
    }
