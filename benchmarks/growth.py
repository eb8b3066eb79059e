"""Measure how time and memory of an update grow with response length and vocabulary.

    python -m benchmarks.growth [--lengths 1024 4096 16384 --vocabularies 8192 131072]

One response, one layer, two heads: the network is cheap, so that head and loss dominate. Each cell
is a separate process: one forward and backward pass of the renormalised top-32 loss on given
teacher ids with K head rows (`rows`), of the full-vocabulary reverse KL in chunks (`chunks`), or of
the same on `.logits` as in a simple implementation (`logits`). Memory is the peak beyond what the
process used before, including the gradients of the weights.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from diagnostics.batch import ScoredRollouts, Support
from opd.models.forward import response_hidden_states
from opd.models.model import CausalLM, split_head
from opd.objectives.catalogue import OBJECTIVES
from opd.objectives.inputs import TokenInputs
from opd.scoring.loss import loss_from_hidden

METHODS = ("rows", "chunks", "logits")
WIDTH, K, PROMPT = 64, 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument(
        "--most", type=float, default=8.0, help="GiB; cells with larger `.logits` are skipped"
    )
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        method, length, vocabulary = args.cell
        print(json.dumps(measure_cell(method, int(length), int(vocabulary))))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; s and MiB")
    print("        V  length  " + "".join(f"{method:>18}" for method in METHODS))
    for vocabulary in args.vocabularies:
        for length in args.lengths:
            numbers = [""] * len(METHODS)
            for i, method in enumerate(METHODS):
                dense = 6 * 4 * vocabulary * length / 2**30
                if method == "logits" and dense > args.most:
                    continue
                line = [sys.executable, "-m", "benchmarks.growth", "--cell", method]
                line += [str(length), str(vocabulary)]
                process = subprocess.run(line, capture_output=True, text=True, check=True)
                measurement = json.loads(process.stdout)
                numbers[i] = f"{measurement['seconds']:.2f} {measurement['mebibytes']:.0f}"
            print(f"{vocabulary:9} {length:7}  " + "".join(f"{x:>18}" for x in numbers), flush=True)


def network(vocabulary: int, length: int, seed: int) -> Any:
    """Return a random one-layer network."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=length + PROMPT,
    )
    return Qwen2ForCausalLM(config).eval()


def measure_cell(method: str, length: int, vocabulary: int) -> dict[str, float]:
    """Return seconds and peak MiB of one update; the teacher is a second random network."""
    student, teacher = (split_head(network(vocabulary, length, s), vocabulary) for s in (0, 1))
    student.network.config.use_cache = False
    ids = torch.randint(vocabulary, (1, PROMPT + length))
    batch = random_batch(ids[:, PROMPT:], vocabulary)
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    if method == "logits":
        dense_update(student, teacher, ids)
    else:
        toolkit_update(method, student, teacher, ids, batch)
    seconds = time.process_time() - begin
    memory_after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "mebibytes": (memory_after - memory_before) / 1024}


def random_batch(tokens: torch.Tensor, vocabulary: int) -> ScoredRollouts:
    """Return a scored batch of one response with random log-probabilities."""
    shape, device = (*tokens.shape, K), tokens.device
    logp = -torch.rand(shape, device=device) * 5 - 5
    flat = -torch.rand(tokens.shape, device=device) * 5
    ids = torch.randint(vocabulary, shape, device=device)
    support = Support(ids=ids, student_logp=logp, teacher_logp=logp, source="teacher")
    return ScoredRollouts(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        sampler_logp=flat,
        prompt=torch.zeros_like(tokens[:, 0]),
        ended=torch.ones_like(tokens[:, 0], dtype=torch.bool),
        student_logp=flat,
        teacher_logp=flat,
        support=support,
    )


def toolkit_update(
    method: str,
    student: CausalLM,
    teacher: CausalLM,
    ids: torch.Tensor,
    batch: ScoredRollouts,
    max_logits_per_chunk: int = 1 << 24,
) -> None:
    """Run forward and backward passes with the toolkit's loss."""
    from opd.data.prompts import Prompts

    prompts = Prompts(
        tokens=ids[:, :PROMPT],
        mask=torch.ones_like(ids[:, :PROMPT], dtype=torch.bool),
        index=torch.zeros_like(ids[:, 0]),
        answers=[""],
    )
    name = "teacher_topk" if method == "rows" else "full_reverse_kl"
    teacher_hidden = None
    if method == "chunks":
        with torch.no_grad():
            teacher_hidden = response_hidden_states(teacher, prompts, batch)
    credit = torch.zeros_like(batch.student_logp)
    weight = torch.full_like(credit, 1 / batch.tokens.numel())
    loss = loss_from_hidden(
        student,
        OBJECTIVES[name],
        response_hidden_states(student, prompts, batch),
        TokenInputs.of(batch, OBJECTIVES[name].support, credit, weight),
        teacher=teacher,
        teacher_hidden=teacher_hidden,
        temperature=1.0,
        max_logits_per_chunk=max_logits_per_chunk,
    )
    loss.backward()


def dense_update(student: CausalLM, teacher: CausalLM, ids: torch.Tensor) -> None:
    """Run forward and backward passes on dense logits."""
    with torch.no_grad():
        q = teacher.network(ids, use_cache=False).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    p = student.network(ids, use_cache=False).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    (p.exp() * (p - q)).sum(-1).mean().backward()


if __name__ == "__main__":
    main()
