"""Load causal language models and tokenizers, and check that two tokenizers agree."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diagnostics.errors import InvalidInput, MissingFile
from diagnostics.io.packages import load_package
from diagnostics.records.eos_ids import combine_eos_ids
from opd.models.model import base_model
from opd.runtime.manifest import read_problem
from opd.serving.addresses import is_url, redact_url

OBJECT_PREFIX = "object:"
"""Begins the name of a model that was passed as an object."""
FOLDER_KINDS = ("tiny", "household", "mismatched", "view", "pretrained")
"""Kinds of models that `opd lab` builds in the folder lab-KIND."""
FOUR_BIT_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4-bit layers."""


def load_model(
    name: str, device: str, dtype: str, trust_remote_code: bool = False, weights: str = "saved"
) -> tuple[Any, Any]:
    """Load tokenizer and model from a folder or hub name, in evaluation mode.

    Args:
        name: Folder or hub name.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: Name of a torch dtype.
        trust_remote_code: Run Python code that comes with the model.
        weights: "saved", or "int8" or "nf4" to quantise all linear layers except the head.

    Returns:
        Tokenizer and model.

    Raises:
        InvalidInput: The name is empty or a server, a file is damaged, or the model needs code of
            its own that is not trusted.
        MissingFile: The folder does not exist or is a run folder.
        MissingPackage: transformers, or bitsandbytes for quantisation, is not installed.
    """
    load_package("transformers", "a model", "train")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not name:
        raise InvalidInput("no model given; set --student and --teacher to a folder or a hub model")
    if name.startswith(OBJECT_PREFIX):
        raise InvalidInput(
            f"{name} is a model that was passed to opd.train as an object, which a run folder does "
            "not hold; pass it again, or save it with save_pretrained and give that folder"
        )
    if is_url(name):
        raise InvalidInput(
            f"{redact_url(name)} is a server, which provides neither weights nor full "
            "distributions; servers can only be the teacher of `opd train`. Use a folder or a hub "
            "model here"
        )
    build_options = {"lab/": "", "smollm/": " --smollm"}
    build_options |= {f"lab-{kind}/": f" --{kind}" for kind in FOLDER_KINDS}
    if name.startswith((".", "/", *build_options)) and not Path(name).is_dir():
        options = [option for folder, option in build_options.items() if name.startswith(folder)]
        hint = f"; build it with `opd lab{options[0]}`" if options else ""
        raise MissingFile(f"model folder {name!r} does not exist{hint}")
    if (Path(name) / "rows.jsonl").exists():
        raise MissingFile(
            f"{name} is a run folder, not a model; the trained model of a finished run is "
            f"{Path(name) / 'final'}"
        )
    disable_progress_bar()
    torch_dtype = getattr(torch, dtype)
    target_device = resolve_device(device)
    quantization = (
        {} if weights == "saved" else quantization_options(weights, torch_dtype, target_device)
    )
    with explain_loading_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch_dtype, trust_remote_code=trust_remote_code, **quantization
        )
    check_four_bit_layers(model)
    return tokenizer, (model if quantization else model.to(target_device)).eval()


def object_name(model: Any) -> str:
    """Return the name under which a run records a model that is an object.

    Args:
        model: A model of transformers or peft.

    Returns:
        The name.

    Raises:
        InvalidInput: It is something else.
    """
    from transformers import PreTrainedModel

    if not isinstance(base_model(model), PreTrainedModel):
        raise InvalidInput(
            f"the model is a {type(model).__name__}; give a model of transformers, such as "
            "AutoModelForCausalLM.from_pretrained(...); a folder or a hub name is a setting"
        )
    return f"{OBJECT_PREFIX}{model.config.name_or_path or type(base_model(model)).__name__}"


def load_or_use(
    model: Any,
    tokenizer: Any,
    device: str,
    dtype: str,
    trust_remote_code: bool = False,
    weights: str = "saved",
) -> tuple[Any, Any]:
    """Load tokenizer and model by name, or use a model that is in memory.

    Args:
        model: Folder, hub name, or a model of transformers or peft, which is moved to the device
            and set to evaluation mode.
        tokenizer: Tokenizer of a model in memory; unused otherwise.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: Name of a torch dtype.
        trust_remote_code: Run Python code that comes with a named model.
        weights: See `load_model`.

    Returns:
        Tokenizer and model.

    Raises:
        InvalidInput: The object is no model, has no tokenizer or another dtype, or should be
            quantised; or as `load_model`.
    """
    if isinstance(model, str):
        return load_model(model, device, dtype, trust_remote_code, weights)
    name = object_name(model)
    if tokenizer is None:
        raise InvalidInput(f"{name} is a model without its tokenizer; pass tokenizer= too")
    if weights != "saved":
        raise InvalidInput(
            f"teacher_weights is {weights}, but {name} is in memory; quantise it when you load it, "
            "and set teacher_weights to saved"
        )
    actual = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    if actual != dtype:
        raise InvalidInput(
            f"{name} has weights in {actual}, but dtype is {dtype}; set dtype to {actual}, or "
            f"convert the model with model.to(torch.{dtype})"
        )
    return tokenizer, model.to(resolve_device(device)).eval()


@contextmanager
def explain_loading_errors(name: str) -> Iterator[None]:
    """Raise errors that name a model's damaged file, or its need for trust_remote_code.

    Files of a folder are checked before loading, because transformers skips a generation config
    that it cannot read; those of a hub model only after loading failed.

    Args:
        name: Folder or hub name.

    Yields:
        Nothing.

    Raises:
        InvalidInput: A file is damaged or missing, or the model's code is not trusted.
    """
    if Path(name).is_dir():
        check_model_files(Path(name), f"copy or download the model {name} again")
    try:
        yield
    except Exception as error:
        message = str(error)
        if isinstance(error, ValueError) and "trust_remote_code" in message:
            raise InvalidInput(
                f"{name} contains custom Python code, which runs only if you allow it: read it, "
                "then add --trust-remote-code to the command (trust_remote_code=True in Python); "
                "the setting is never taken from a run folder or a file"
            ) from error
        if not Path(name).is_dir() and (cache := find_cached_folder(name)) is not None:
            remedy = f"delete it to download {name} again"
            check_model_files(cache, remedy)
        raise


def find_cached_folder(name: str) -> Path | None:
    """Return the folder of a hub model's files on this machine, or None."""
    from transformers.utils import cached_file

    try:
        path = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(path).parent if path else None


def check_model_files(folder: Path, remedy: str) -> None:
    """Refuse a model folder with an unreadable file or missing weight shards.

    Args:
        folder: Folder of the model.
        remedy: What to do, for the message.

    Raises:
        InvalidInput: A file is damaged or missing; the message names it.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for path in files:
        if problem := read_problem(path):
            raise InvalidInput(f"{problem}; {remedy}")
        if path.name.endswith(".index.json"):
            listed_parts = json.loads(path.read_text("utf-8")).get("weight_map", {}).values()
            missing_parts = sorted({part for part in listed_parts if not (folder / part).is_file()})
            if missing_parts:
                raise InvalidInput(
                    f"{folder / missing_parts[0]}, which {path.name} lists, is missing; {remedy}"
                )


def check_four_bit_layers(model: Any) -> None:
    """Make 4-bit layers on a CPU compute the same on every processor, or refuse them.

    On processors with AVX512-BF16 bitsandbytes repacks such a layer in its first forward pass: it
    rounds scales and inputs to bfloat16 and fails where the outputs are not a multiple of 32. That
    is switched off. Its AVX-512 kernel also reads the wrong scale where a row ends within a block
    of 64 weights (0.50.2; errors as large as the weights), so such layers are refused.

    Args:
        model: Hugging Face model.

    Raises:
        InvalidInput: A 4-bit layer on a CPU has inputs that are not a multiple of the block size.
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


def quantization_options(weights: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return options of `from_pretrained` that quantise with bitsandbytes.

    Args:
        weights: "int8" for LLM.int8() or "nf4" for 4-bit NormalFloat.
        dtype: Compute dtype of 4-bit layers.
        device: Device of the model.

    Returns:
        Keyword arguments.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    purpose, otherwise = f"teacher_weights {weights}", "set teacher_weights saved"
    load_package("bitsandbytes", purpose, "quantised", alternative=otherwise)
    from transformers import BitsAndBytesConfig

    configs = {
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        ),
    }
    return {"quantization_config": configs[weights], "device_map": {"": device}}


def resolve_device(device: str) -> str:
    """Return the device name, with "auto" resolved to cuda if available, else cpu.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        Name of a torch device.

    Raises:
        InvalidInput: The name is unknown, or this machine has no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InvalidInput(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(f"device is {device!r}, but this machine has no CUDA device; use cpu")
    return device


def check_same_vocabulary(student: Any, teacher: Any) -> None:
    """Refuse a pair of tokenizers whose ids mean different strings.

    Args:
        student: Tokenizer of the student.
        teacher: Tokenizer of the teacher.

    Raises:
        InvalidInput: The vocabularies differ; the message lists up to five tokens.
    """
    student_vocab, teacher_vocab = student.get_vocab(), teacher.get_vocab()
    if student_vocab == teacher_vocab:
        return
    different_tokens = sorted(
        token
        for token in student_vocab.keys() | teacher_vocab.keys()
        if student_vocab.get(token) != teacher_vocab.get(token)
    )
    examples = ", ".join(
        f"{token!r}: {student_vocab.get(token)} / {teacher_vocab.get(token)}"
        for token in different_tokens[:5]
    )
    raise InvalidInput(
        f"student and teacher tokenizers differ in {len(different_tokens)} of "
        f"{len(student_vocab)} / {len(teacher_vocab)} "
        f"tokens (id of student / teacher: {examples}); on-policy distillation scores the "
        "student's ids with the teacher, so both must have the same vocabulary"
    )


def eos_ids(tokenizer: Any, network: Any) -> list[int]:
    """Return the sorted EOS ids of a loaded model; `read_eos_ids` is the same for its folder.

    Args:
        tokenizer: Hugging Face tokenizer.
        network: Hugging Face model.

    Returns:
        At least one id.

    Raises:
        InvalidInput: Neither has an EOS token.
    """
    check_has_eos(tokenizer, network)
    return sorted(known_eos_ids(tokenizer, network))


def check_has_eos(tokenizer: Any, network: Any) -> None:
    """Refuse a loaded model without an EOS token.

    Args:
        tokenizer: Hugging Face tokenizer.
        network: Hugging Face model.

    Raises:
        InvalidInput: Neither has an EOS token.
    """
    if not known_eos_ids(tokenizer, network):
        raise InvalidInput(
            "no EOS token: set tokenizer.eos_token or generation_config.eos_token_id; without one "
            "every rollout runs to the maximum length"
        )


def known_eos_ids(tokenizer: Any, network: Any) -> tuple[int, ...]:
    """Return the EOS ids of a loaded model, its tokenizer's own first; empty without any."""
    return combine_eos_ids(tokenizer.eos_token_id, network.generation_config.eos_token_id)


def num_head_rows(network: Any) -> int:
    """Return the number of rows of the LM head."""
    return network.get_output_embeddings().weight.shape[0]
