"""Rollouts of verl with our mask rules and a length for each task (verl 0.9).

verl's denominators count what its response_mask counts, so the place to mask is the rollout, not
the loss. The settings stand in the file `rollout.agent.agent_loop_config_path`, a list:

    - name: opdlab
      _target_: opd.integrations.verl.agent_loop.SingleTurn
      rules: [paper]
      lengths: {alfworld: 512}

and `rollout.agent.default_agent_loop=opdlab` chooses it.
"""

from functools import lru_cache
from typing import Any

import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from diagnostics.errors import InvalidInput
from opd.tokens.masking import ResolvedMaskRules, resolve, supervised


class SingleTurn(SingleTurnAgentLoop):
    """verl's rollout of one turn, whose response_mask lacks the tokens that rules take out.

    rules: of `opd.tokens.mask_rules`; `role:eos` is the tokenizer's own end. lengths: the most tokens of a
    response by data_source, rollout.response_length where it names none.
    """

    def __init__(
        self, *args: Any, rules: list[str], lengths: dict[str, int] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.masks = resolved(tuple(rules), self.tokenizer)
        self.lengths = lengths or {}
        longest = self.rollout_config.response_length
        for task, length in self.lengths.items():
            if not 0 < length <= longest:
                raise InvalidInput(
                    f"lengths: {task} is {length}, rollout.response_length is {longest}; a task's "
                    "length lies between 1 and that"
                )

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        task = kwargs.get("data_source")
        if task in self.lengths:
            sampling_params = sampling_params | {"max_tokens": self.lengths[task]}
        output = await super().run(sampling_params, **kwargs)
        if output.response_ids:
            ids, mask = torch.tensor(output.response_ids), torch.tensor(output.response_mask)
            kept = supervised(ids[None], mask[None].bool(), self.masks)[0]
            output.response_mask = kept.long().tolist()
        return output


@lru_cache(maxsize=8)
def resolved(rules: tuple[str, ...], tokenizer: Any) -> list[ResolvedMaskRules]:
    """The rules in the tokenizer's ids, once: verl makes a new loop for every response."""
    return resolve(rules, tokenizer, [tokenizer.eos_token_id])
