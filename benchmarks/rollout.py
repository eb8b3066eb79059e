"""Measure the speed of rollout engines relative to plain `generate`.

    python -m benchmarks.rollout [--device cuda] [--engines hf vllm]

The reference is the loop of TRL-style trainers: one `generate` call with sampling, temperature,
top-p and the default dynamic cache. It returns no log-probabilities; the engines return both.
Random weights and prompts of different lengths. In the first table an EOS id is never sampled, so
that all responses have the same length; in the second, one id in ENDS_EVERY ends a response, so
that lengths are uneven, and only tokens up to the end are counted. Engines alternate; medians of
`--repeats` after a first call that compiles. On a CPU: one thread and CPU seconds, which do not
include other processes, so vLLM is timed on GPUs only.
"""

import argparse
import platform
from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch
import transformers

from benchmarks.timing import clock_seconds
from opd.data.prompts import Prompts
from opd.lab.build import make_tokenizer
from opd.models.model import CausalLM
from opd.rollouts.decoding import mask_until_eos
from opd.rollouts.factory import make_engine
from opd.teachers.pair import load_pair

TEMPERATURE, TOP_P = 1.0, 0.9
ON_CPU = {
    "2 layers, 64 wide": (2, 64, 512, 32, 64, 128),
    "6 layers, 256 wide": (6, 256, 4096, 16, 64, 32),
    "2 layers, 128 wide, large vocabulary": (2, 128, 49152, 16, 64, 32),
}
"""Name to (layers, width, vocabulary, rows, longest prompt, response)."""
ON_GPU = {"24 layers, 896 wide (0.5B)": (24, 896, 151936, 128, 128, 256)}
ENDS_EVERY = 24
"""Every so many ids one is an EOS id in the second table."""
Shape = tuple[int, int, int, int, int, int]


def make_model(shape: Shape, device: str) -> CausalLM:
    """Return a random model with an entropy similar to that of a language model."""
    layers, width, vocabulary, _, prompt, response = shape
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4864 if width == 896 else 2 * width,
        num_hidden_layers=layers,
        num_attention_heads=14 if width == 896 else width // 32,
        num_key_value_heads=2,
        max_position_embeddings=2 * (prompt + response),
        tie_word_embeddings=False,
    )
    with TemporaryDirectory() as folder:
        network = transformers.Qwen2ForCausalLM(config)
        # scale the head to an entropy of a few nats, as for text: random heads are nearly uniform
        network.get_output_embeddings().weight.data *= 6 / (0.02 * width**0.5)
        network.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        dtype = "bfloat16" if device == "cuda" else "float32"
        return load_pair(folder, folder, device, dtype).student


def make_prompts(shape: Shape) -> Prompts:
    """Return prompts with lengths spread evenly from a quarter of the longest to the longest."""
    _, _, vocabulary, rows, longest, _ = shape
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(longest // 4, longest, rows).long()
    lengths = lengths[torch.randperm(rows, generator=generator)]
    mask = torch.arange(longest) >= longest - lengths[:, None]
    tokens = torch.randint(min(vocabulary, 200), (rows, longest), generator=generator) * mask
    return Prompts(tokens=tokens, mask=mask, index=torch.arange(rows), answers=[""] * rows)


def generate_runner(
    model: CausalLM, prompts: Prompts, response: int, eos: list[int]
) -> Callable[[int], int]:
    """Return a function that samples with `generate` and returns the number of tokens."""
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        top_k=0,
        max_new_tokens=response,
        eos_token_id=eos,
        pad_token_id=eos[0],
    )

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        network, device = model.network, model.device
        with torch.no_grad():
            out = network.generate(
                inputs=prompts.tokens.to(device),
                attention_mask=prompts.mask.long().to(device),
                generation_config=settings,
            )
        return int(mask_until_eos(out[:, prompts.tokens.shape[1] :], eos)[0].sum())

    return run


def engine_runner(
    name: str, model: CausalLM, prompts: Prompts, response: int, eos: list[int]
) -> Callable[[int], int]:
    """Return a function that samples with an engine and returns the number of tokens."""
    longest = prompts.tokens.shape[1] + response
    engine = make_engine(name, model, **({"max_length": longest} if name == "vllm" else {}))

    def run(seed: int) -> int:
        batch = engine.sample(
            prompts,
            eos,
            max_response=response,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            generator=torch.Generator().manual_seed(seed),
        )
        return int(batch.mask.sum())

    return run


def tokens_per_second(run: Callable[[int], int], seed: int, device: str) -> float:
    """Return tokens per second of one call."""
    begin = clock_seconds(device)
    tokens = run(seed)
    return tokens / (clock_seconds(device) - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--engines", nargs="+", default=["hf"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
        if "vllm" in args.engines:
            parser.error(
                "vLLM runs in another process, whose CPU time is not measured; use --device cuda"
            )
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(
        f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    for ends_every in (0, ENDS_EVERY):
        print("uneven lengths" if ends_every else "equal lengths")
        for label, shape in (ON_GPU if args.device == "cuda" else ON_CPU).items():
            eos = list(range(0, shape[2], ends_every)) if ends_every else [shape[2]]
            compare(label, shape, eos, args)


def compare(label: str, shape: Shape, eos: list[int], args: argparse.Namespace) -> None:
    """Time all engines on one model, and print their rates."""
    model, prompts, response = make_model(shape, args.device), make_prompts(shape), shape[5]
    runs = {"generate": generate_runner(model, prompts, response, eos)}
    runs |= {n: engine_runner(n, model, prompts, response, eos) for n in args.engines}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for seed in range(args.repeats + 1):
        for name, run in runs.items():
            rates[name].append(tokens_per_second(run, seed, args.device))
    middle = {n: sorted(x[1:])[args.repeats // 2] for n, x in rates.items()}
    print(f"{label}, V = {shape[2]}, {shape[3]} rows, {shape[4]} + {response} tokens")
    for name, value in middle.items():
        ratio = value / middle["generate"]
        print(f"  {name:10s} {value:10.0f} tokens/s   ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
