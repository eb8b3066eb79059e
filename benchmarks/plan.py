"""Estimate tokens, memory, traffic and time of a distillation step at 7B to 72B.

    python -m benchmarks.plan            # the tables of docs/scale.md

Nothing is measured. The estimate uses public figures of the machine, published model sizes, and
the utilisation factors below. Large terms are right to a factor of two; the purpose is to see which
term dominates.
"""

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Size:
    """Size of a decoder."""

    name: str
    weights: float
    """Number of weights."""
    layers: int
    """Number of layers."""
    width: int
    """Hidden size."""
    kv: int
    """Bytes of keys and values per token (bfloat16)."""
    vocabulary: int
    """Number of token ids."""


@dataclass(frozen=True)
class Machine:
    """A GPU and its links."""

    memory: float = 80 * GB
    flops: float = 989e12
    bandwidth: float = 3350 * GB
    link: float = 450 * GB
    use: float = 0.4
    """Fraction of the peak FLOPs that training attains."""
    reach: float = 0.7
    """Fraction of the peak bandwidth that memory and links attain."""


@dataclass(frozen=True)
class Load:
    """Work of one step."""

    responses: int = 128
    prompt: int = 200
    """Prompt length in tokens."""
    mean: int = 6000
    """Mean response length in tokens."""
    longest: int = 16384
    """Longest response in tokens."""
    k: int = 32
    """Number of support ids K."""
    micro: int = 16384
    """Tokens per micro-batch."""
    at_once: int = 8
    """Responses that a GPU samples together."""


SEVEN = Size("7B", 7.6e9, 28, 3584, 2 * 28 * 4 * 128 * 2, 152064)
FOURTEEN = Size("14B", 14.8e9, 48, 5120, 2 * 48 * 8 * 128 * 2, 152064)
SEVENTY = Size("72B", 72.7e9, 80, 8192, 2 * 80 * 8 * 128 * 2, 152064)


def memory(size: Size, gpus: int, load: Load, sharded: bool) -> dict[str, float]:
    """Return bytes on each GPU by purpose, with the teacher in host memory or on a server."""
    parts = gpus if sharded else 1
    layer, ends = 2 * size.weights / size.layers, 2 * 2 * size.vocabulary * size.width
    network = 2 * layer + ends if sharded else 2 * size.weights
    states = 2 * load.micro * size.width * (size.layers + 20)
    sampling, updating = "sampling and scoring", "update"
    return {
        f"{sampling}: masters and moments (12 bytes a weight)": 12 * size.weights / parts,
        f"{sampling}: the whole bfloat16 student": 2 * size.weights,
        f"{sampling}: keys and values of {load.at_once} responses at their longest": load.at_once
        * load.longest
        * size.kv,
        f"{updating}: masters, moments, gradients (16 bytes a weight)": 16 * size.weights / parts,
        f"{updating}: bfloat16 layers that are there at once": network,
        f"{updating}: activations of a micro-batch, layers recomputed": states,
        f"{updating}: logits of a chunk, three times": 3 * 4 * 2.0**28,
    }


def seconds(size: Size, gpus: int, load: Load, machine: Machine) -> dict[str, float]:
    """Return seconds of a step by activity; the teacher is as large as the student."""
    tokens = load.responses * (load.prompt + load.mean)
    rate = gpus * machine.flops * machine.use
    rows = load.responses / gpus
    reading = 2 * size.weights + rows * load.mean / 2 * size.kv
    pull = load.longest * reading / (machine.bandwidth * machine.reach)
    passes = tokens / gpus / load.micro
    link_bytes = passes * (2 * 2 + 4) * size.weights * (gpus - 1) / gpus
    return {
        "rollout, until the longest response ends": pull,
        "rollout, if no response were longer than the mean": pull * load.mean / load.longest,
        "teacher's forward pass": 2 * size.weights * tokens / rate,
        "student's forward pass for exact measures": 2 * size.weights * tokens / rate,
        "update: forward, recomputed, backward": 8 * size.weights * tokens / rate,
        "sharded weights and gradients over the links": link_bytes / (machine.link * machine.reach),
    }


def traffic(size: Size, load: Load) -> dict[str, float]:
    """Return bytes moved in a step, besides the weights of layers, over all processes."""
    supervised = load.responses * load.mean
    padded = load.responses * load.longest
    return {
        "numbers of tokens for credit and denominators (20 columns, float32)": 20 * 4 * padded,
        "teacher's top-K as tensors (ids 8, two log-probs 4 bytes)": supervised * load.k * 16,
        "teacher's top-K as a server's JSON (86 bytes an entry, measured)": supervised
        * load.k
        * 86,
        "weights to rollout servers, once": 2 * size.weights,
        "sums of all metrics, once": 2.0**20,
    }


def table(heads: list[str], columns: list[dict[str, float]], scale: float, unit: str) -> str:
    """Return a Markdown table."""
    lines = [f"| {unit} | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    lines += [
        f"| {name} | " + " | ".join(f"{column[name] / scale:.3g}" for column in columns) + " |"
        for name in columns[0]
    ]
    for phase in ("sampling", "update:") if unit.startswith("GB on") else ():
        parts = [sum(x for name, x in c.items() if name.startswith(phase)) for c in columns]
        sums = " | ".join(f"**{part / scale:.3g}**" for part in parts)
        lines.append(f"| sum while {phase.rstrip(':')} | {sums} |")
    return "\n".join(lines)


def main() -> None:
    load, machine = Load(), Machine()
    places = [(SEVEN, 8, False), (SEVEN, 8, True), (FOURTEEN, 8, True), (SEVENTY, 64, True)]
    heads = [
        f"{size.name}, {gpus} GPUs, {'sharded' if sharded else 'whole'}"
        for size, gpus, sharded in places
    ]
    columns = [memory(size, gpus, load, sharded) for size, gpus, sharded in places]
    print(table(heads, columns, GB, "GB on each GPU (80)"), end="\n\n")
    places = places[1:]
    columns = [seconds(size, gpus, load, machine) for size, gpus, _ in places]
    print(table(heads[1:], columns, 1.0, "seconds of a step"), end="\n\n")
    columns = [traffic(size, load) for size, _, _ in places]
    print(table(heads[1:], columns, GB, "GB moved in a step"))


if __name__ == "__main__":
    main()
