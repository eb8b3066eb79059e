"""Faults of a pair of toy models on disk, for the checks of `opd doctor`."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from opd.lab.build import TEMPLATE, make_tokenizer

END, OTHER, THINK = 1, 2, 3
"""Ids of the end of a turn, of the other end token, and of the tag <think>."""
ModelPair = tuple[Path, Path]
"""Folders of student and teacher."""


def save(network, folder: Path) -> None:
    network.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def edit(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[object], None]) -> None:
    """Change the weights of a model on disk."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(network)
    network.save_pretrained(folder)


def untie_head(network) -> torch.Tensor:
    """Untie the LM head from the embeddings and return its weight."""
    rows = network.get_output_embeddings()
    rows.weight = torch.nn.Parameter(rows.weight.detach().clone())
    network.config.tie_word_embeddings = False
    return rows.weight


def swap_two_ids(pair: ModelPair) -> None:
    def change(state: dict) -> None:
        words = state["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]

    edit(pair[1] / "tokenizer.json", change)


def one_token_more(pair: ModelPair) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(pair[1])
    for folder in pair:
        edit_weights(folder, lambda network: add_rows(network, 262))


def add_rows(network, rows: int) -> None:
    """Add vocabulary rows, each as improbable as a rare byte."""
    network.resize_token_embeddings(rows, mean_resizing=False)
    weight = network.get_input_embeddings().weight
    weight[261:] = weight[200]


def change_end_ids(folder: Path, ids: int | list[int]) -> None:
    edit(folder / "generation_config.json", lambda c: c.update(eos_token_id=ids))
    if isinstance(ids, int):
        edit(folder / "config.json", lambda c: c.update(eos_token_id=ids))
        name = make_tokenizer().convert_ids_to_tokens(ids)
        edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token=name))


def write_template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


def merge_in_one(pair: ModelPair) -> None:
    def change(state: dict, merges: list) -> None:
        state["model"]["vocab"]["et"] = 261
        state["model"]["merges"] = merges

    for folder, merges in zip(pair, ([["e", "t"]], []), strict=True):
        edit(folder / "tokenizer.json", lambda s, m=merges: change(s, m))
        edit_weights(folder, lambda network: add_rows(network, 262))


def ordinary_think(pair: ModelPair) -> None:
    def change(state: dict) -> None:
        for token in state["added_tokens"]:
            if token["content"] == "<think>":
                token["special"] = False

    edit(pair[1] / "tokenizer.json", change)
    for key in ("extra_special_tokens", "additional_special_tokens"):
        edit(
            pair[1] / "tokenizer_config.json",
            lambda c, k=key: c.update({k: [t for t in c[k] if t != "<think>"]}) if k in c else None,
        )


def double_bos(pair: ModelPair) -> None:
    token = {"id": "<|im_start|>", "type_id": 0}
    special = {"id": "<|im_start|>", "ids": [0], "tokens": ["<|im_start|>"]}

    def change(state: dict) -> None:
        state["post_processor"]["single"].insert(0, {"SpecialToken": token})
        state["post_processor"]["special_tokens"] = {"<|im_start|>": special}

    for folder in pair:
        edit(folder / "tokenizer.json", change)
        use_bos(folder)


def use_bos(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(bos_token="<|im_start|>"))


def pad_with_the_end(pair: ModelPair) -> None:
    for folder in pair:
        edit(folder / "tokenizer_config.json", lambda c: c.update(pad_token="<|im_end|>"))


def never_think(pair: ModelPair) -> None:
    def change(network) -> None:
        untie_head(network)[THINK] *= -3

    edit_weights(pair[1], change)


def name_the_end_otherwise(pair: ModelPair) -> None:
    def change(network) -> None:
        weight = untie_head(network)
        weight[[END, OTHER]] = weight[[OTHER, END]]

    edit_weights(pair[1], change)
    change_end_ids(pair[1], OTHER)


def halve_the_end(network) -> None:
    weight = network.get_output_embeddings().weight
    weight[END] = weight[OTHER]


def flatten_logits(pair: ModelPair) -> None:
    for folder in pair:
        edit_weights(folder, lambda network: network.model.norm.weight.mul_(0.2))


def not_a_number(pair: ModelPair) -> None:
    edit_weights(pair[0], lambda network: network.model.norm.weight.fill_(float("nan")))


def fewer_rows(pair: ModelPair) -> None:
    edit_weights(pair[1], lambda network: network.resize_token_embeddings(258))


def padded_head(pair: ModelPair) -> None:
    edit_weights(pair[1], lambda network: add_rows(network, 320))


def other_template(pair: ModelPair) -> None:
    write_template(pair[1], TEMPLATE.replace("assistant\n", "assistant\n<think>"))


def no_system_role(pair: ModelPair) -> None:
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    write_template(pair[1], refuse + TEMPLATE)


def other_turn_end(pair: ModelPair) -> None:
    for folder in pair:
        write_template(folder, TEMPLATE.replace("<|im_end|>", "<|endoftext|>"))
