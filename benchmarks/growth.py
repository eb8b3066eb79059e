"""How time and memory of an update grow with the response and with the vocabulary.

    python -m benchmarks.growth [--lengths 1024 4096 16384 --vocabularies 8192 131072]

One response, one layer, two heads: the network costs little, so that head and loss are seen. Each
cell is a process of its own: one forward and backward of the renormalised top-32 loss on given
teacher ids through K head rows (`rows`), of the full-vocabulary reverse KL in chunks (`chunks`), or
of that on `.logits` as one would write it first (`logits`). Memory is the peak beyond what the
process held before, gradients of the weights included.
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
from opd.models.forward import response_hidden
from opd.models.model import CausalLM, split
from opd.objectives.factory import OBJECTIVES
from opd.scoring.loss import loss_from_hidden
from opd.teachers.pair import ModelPair

WAYS = ("rows", "chunks", "logits")
WIDTH, K, PROMPT = 64, 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument(
        "--most", type=float, default=8.0, help="GiB; larger `.logits` are left out"
    )
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        way, length, vocabulary = given.cell
        print(json.dumps(cell(way, int(length), int(vocabulary))))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; s and MiB")
    print("        V  length  " + "".join(f"{way:>18}" for way in WAYS))
    for vocabulary in given.vocabularies:
        for length in given.lengths:
            numbers = [""] * len(WAYS)
            for i, way in enumerate(WAYS):
                dense = 6 * 4 * vocabulary * length / 2**30
                if way == "logits" and dense > given.most:
                    continue
                line = [sys.executable, "-m", "benchmarks.growth", "--cell", way]
                line += [str(length), str(vocabulary)]
                done = subprocess.run(line, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout)
                numbers[i] = f"{found['seconds']:.2f} {found['mebibytes']:.0f}"
            print(f"{vocabulary:9} {length:7}  " + "".join(f"{x:>18}" for x in numbers), flush=True)


def network(vocabulary: int, length: int, seed: int) -> Any:
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


def cell(way: str, length: int, vocabulary: int) -> dict[str, float]:
    """Seconds and peak MiB of one update; the teacher is a second random network."""
    student, teacher = (split(network(vocabulary, length, s), vocabulary) for s in (0, 1))
    student.network.config.use_cache = False
    ids = torch.randint(vocabulary, (1, PROMPT + length))
    batch = given_batch(ids[:, PROMPT:], vocabulary)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    if way == "logits":
        dense(student, teacher, ids)
    else:
        lean(way, student, teacher, ids, batch)
    seconds = time.process_time() - begin
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "mebibytes": (after - before) / 1024}


def given_batch(tokens: torch.Tensor, vocabulary: int) -> ScoredRollouts:
    """A scored batch of one response with made-up numbers."""
    shape = (*tokens.shape, K)
    logp = -torch.rand(shape) * 5 - 5
    flat = -torch.rand(tokens.shape) * 5
    support = Support(
        ids=torch.randint(vocabulary, shape), student_logp=logp, teacher_logp=logp, source="teacher"
    )
    return ScoredRollouts(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        sampler_logp=flat,
        prompt=torch.zeros(1, dtype=torch.long),
        ended=torch.ones(1, dtype=torch.bool),
        student_logp=flat,
        teacher_logp=flat,
        support=support,
    )


def lean(
    way: str, student: CausalLM, teacher: CausalLM, ids: torch.Tensor, batch: ScoredRollouts
) -> None:
    from opd.data.prompts import Prompts

    prompts = Prompts(
        tokens=ids[:, :PROMPT],
        mask=torch.ones(1, PROMPT, dtype=torch.bool),
        index=torch.zeros(1, dtype=torch.long),
        answers=[""],
    )
    pair = ModelPair(student, teacher, None, [])
    name = "teacher_topk" if way == "rows" else "full_reverse_kl"
    taught = None
    if way == "chunks":
        with torch.no_grad():
            taught = response_hidden(teacher, prompts, batch)
    loss = loss_from_hidden(
        pair,
        OBJECTIVES[name](),
        response_hidden(student, prompts, batch),
        taught,
        batch,
        torch.zeros(batch.tokens.shape),
        torch.full((batch.tokens.numel(),), 1 / batch.tokens.numel()),
        max_logits_per_chunk=1 << 24,
    )
    loss.backward()


def dense(student: CausalLM, teacher: CausalLM, ids: torch.Tensor) -> None:
    with torch.no_grad():
        q = teacher.network(ids, use_cache=False).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    p = student.network(ids, use_cache=False).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    (p.exp() * (p - q)).sum(-1).mean().backward()


if __name__ == "__main__":
    main()
