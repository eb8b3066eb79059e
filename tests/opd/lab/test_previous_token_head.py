"""The head that attends to the previous token does so, and only where a model asks for it."""

from dataclasses import replace

import torch

from opd.lab.build import make_tokenizer, new_model, recorded_settings
from opd.lab.configs import LabConfig, ToyModelConfig, view_config


def previous_weights(config: ToyModelConfig) -> torch.Tensor:
    """Return (heads, positions) attention of the first layer to the previous token."""
    tokenizer = make_tokenizer()
    network = new_model(config, 0, tokenizer)
    network.set_attn_implementation("eager")
    ids = torch.randint(5, 200, (1, 90), generator=torch.Generator().manual_seed(0))
    attention = network(ids, output_attentions=True).attentions[0][0]
    return attention.diagonal(-1, 1, 2)


def test_the_first_head_attends_to_the_previous_token() -> None:
    config = ToyModelConfig(layers=1, width=64, steps=1, batch=1, lr=1.0, previous_token_head=True)
    weights = previous_weights(config)
    assert weights[0].min() > 0.9
    assert weights[1, 9:].max() < 0.5, "other heads are as they were"
    assert previous_weights(replace(config, previous_token_head=False))[0, 9:].max() < 0.5


def test_settings_of_older_models_stay_equal() -> None:
    settings = recorded_settings(LabConfig())
    assert not {"start", "previous_token_head"} & set(settings["teacher"])
    view = recorded_settings(view_config())
    assert view["teacher"]["previous_token_head"] is True
    assert view["student"]["start"] == "teacher"
    assert [name for name, _ in view["others"]] == [f"student-{i}" for i in range(1, 5)]
