"""Load causal language models and tokenizers, and check that two of them fit together."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.packages import load_package
from opd.runtime.manifest import unreadable
from opd.serving.addresses import is_url, without_secrets

FOUR_BIT_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4-bit layers."""


def load(
    name: str, device: str, dtype: str, trust: bool = False, weights: str = "saved"
) -> tuple[Any, Any]:
    """Tokenizer and model of a folder or hub name, in evaluation mode.

    trust: run Python code that lies beside the weights, if there is any. weights: "saved", or
    "int8" or "nf4", to quantise all linear layers but the head.

    Raises:
      ValueError: no name, a server, a damaged file, or a model with code of its own that is not
        trusted.
      FileNotFoundError: no such folder.
      ImportError: bitsandbytes, which quantises, is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not name:
        raise InvalidInput(
            "no model given; name a folder or a hub model for --student and --teacher"
        )
    if is_url(name):
        raise InvalidInput(
            f"{without_secrets(name)} is a server, which shows no weights and whole distributions; "
            "it can be the teacher of `opd train` alone. Name a folder or a hub model here"
        )
    made = {"lab/": "", "smollm/": " --smollm"}
    made |= {f"lab-{kind}/": f" --{kind}" for kind in ("tiny", "household", "mismatched")}
    if name.startswith((".", "/", *made)) and not Path(name).is_dir():
        how = [option for folder, option in made.items() if name.startswith(folder)]
        hint = f"; build it with `opd lab{how[0]}`" if how else ""
        raise MissingFile(f"model folder {name!r} does not exist{hint}")
    if (Path(name) / "rows.jsonl").exists():
        raise MissingFile(
            f"{name} is a run folder and no model; the trained model of a finished run is "
            f"{Path(name) / 'final'}"
        )
    disable_progress_bar()
    kind = getattr(torch, dtype)
    place = resolve_device(device)
    fewer = {} if weights == "saved" else quantised(weights, kind, place)
    with explained_loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=kind, trust_remote_code=trust, **fewer
        )
    check_four_bit_layers(model)
    return tokenizer, (model if fewer else model.to(place)).eval()


@contextmanager
def explained_loading(name: str) -> Iterator[None]:
    """Name the damaged file of a model, or that it wants its own code to be run.

    Files of a folder are looked at before (transformers passes over a generation config that it
    cannot read), those of a hub model only when it cannot be loaded.

    Raises:
      InvalidInput: a file is damaged or missing, or the model's code is not trusted.
    """
    if Path(name).is_dir():
        refuse_damaged(Path(name), f"copy or download the model {name} again")
    try:
        yield
    except Exception as error:
        said = str(error)
        if isinstance(error, ValueError) and "trust_remote_code" in said:
            raise InvalidInput(
                f"{name} brings Python code of its own, which is run only if you allow it: read "
                "it, then add --trust-remote-code to the command (trust_remote_code=True in "
                "Python); what a run folder or a file says of it counts for nothing"
            ) from error
        if not Path(name).is_dir() and (cached := cached_folder(name)) is not None:
            remedy = f"delete it, and {name} is downloaded again"
            refuse_damaged(cached, remedy)
        raise


def cached_folder(name: str) -> Path | None:
    """The folder of a hub model's files on this machine, if there are any."""
    from transformers.utils import cached_file

    try:
        path = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(path).parent if path else None


def refuse_damaged(folder: Path, remedy: str) -> None:
    """Refuse a model's folder with a file that cannot be read, or lacks a part of the weights.

    Raises:
      InvalidInput: names the file.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        if problem := unreadable(path):
            raise InvalidInput(f"{problem}; {remedy}")
        if path.name.endswith(".index.json"):
            parts = json.loads(path.read_text("utf-8")).get("weight_map", {}).values()
            lacking = sorted({part for part in parts if not (folder / part).is_file()})
            if lacking:
                raise InvalidInput(
                    f"{folder / lacking[0]}, which {path.name} lists, is missing; {remedy}"
                )


def check_four_bit_layers(model: Any) -> None:
    """Make 4-bit layers on a CPU compute the same on every processor, or refuse them.

    On processors with AVX512-BF16 bitsandbytes repacks such a layer in its first forward pass: it
    rounds scales and inputs to bfloat16 and fails where the outputs are no multiple of 32. That is
    switched off. Its AVX-512 kernel also reads the wrong scale where a row ends within a block of
    64 weights (0.50.2; errors as large as the weights), so such layers are refused.

    Raises:
      ValueError: a 4-bit layer on a CPU whose inputs are no multiple of the block of 64 weights.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if module.weight.device.type == "cpu" and module.in_features % FOUR_BIT_BLOCK:
                raise InvalidInput(
                    f"nf4 on a CPU: {name} has {module.in_features} inputs, expected a multiple of "
                    f"{FOUR_BIT_BLOCK}, since bitsandbytes reads wrong scales otherwise; set "
                    "teacher_weights int8 or saved, or use a GPU"
                )


def quantised(weights: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Settings of `from_pretrained` that quantise: "int8", LLM.int8(); "nf4", normal floats.

    Raises:
      ImportError: bitsandbytes is not installed.
    """
    purpose, otherwise = f"teacher_weights {weights}", "set teacher_weights saved"
    load_package("bitsandbytes", purpose, "quantised", otherwise=otherwise)
    from transformers import BitsAndBytesConfig

    how = {
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        ),
    }
    return {"quantization_config": how[weights], "device_map": {"": device}}


def resolve_device(device: str) -> str:
    """The device of that name; of "auto", cuda where there is one.

    Raises:
      InvalidInput: no device has this name, or this machine has none of the kind.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InvalidInput(f"unknown device {device!r}; write auto, cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(f"device is {device!r}, and this machine has no CUDA device; write cpu")
    return device


def check_same_vocabulary(student: Any, teacher: Any) -> None:
    """Refuse a pair whose token ids mean different strings."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differ = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    shown = ", ".join(f"{t!r}: {ours.get(t)} / {theirs.get(t)}" for t in differ[:5])
    raise InvalidInput(
        f"student and teacher tokenizers differ in {len(differ)} of {len(ours)} / {len(theirs)} "
        f"tokens (id of student / teacher: {shown}); on-policy distillation scores the student's "
        "ids with the teacher, so both need one vocabulary"
    )


def end_ids(tokenizer: Any, network: Any) -> list[int]:
    """Ids that end a response: the tokenizer's and the generation config's."""
    listed = network.generation_config.eos_token_id
    ids = set(listed if isinstance(listed, list) else [listed]) | {tokenizer.eos_token_id}
    ids.discard(None)
    if not ids:
        raise InvalidInput(
            "no end-of-sequence token: set tokenizer.eos_token or generation_config.eos_token_id; "
            "without one every rollout runs to its budget"
        )
    return sorted(ids)


def own_first(tokenizer: Any, ends: list[int]) -> tuple[int, ...]:
    """The end ids, the tokenizer's own before those of the generation config alone."""
    return tuple(sorted(ends, key=lambda i: i != tokenizer.eos_token_id))


def head_rows(network: Any) -> int:
    return network.get_output_embeddings().weight.shape[0]
