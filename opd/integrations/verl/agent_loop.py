"""verl rollouts with mask rules and a response length per task (verl 0.9).

verl's denominators count the tokens of its response_mask, so masks are applied in the rollout, not
in the loss. The settings are a list in the file `rollout.agent.agent_loop_config_path`:

    - name: opdlab
      _target_: opd.integrations.verl.agent_loop.SingleTurn
      rules: [paper]
      lengths: {alfworld: 512}

and `rollout.agent.default_agent_loop=opdlab` selects it.
"""

from functools import lru_cache
from typing import Any

import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from diagnostics.errors import InvalidInput
from opd.tokens.masking import ResolvedMaskRules, resolve_mask_rules, supervised_mask


class SingleTurn(SingleTurnAgentLoop):
    """verl's single-turn rollout with the masked tokens removed from response_mask."""

    def __init__(
        self, *args: Any, rules: list[str], lengths: dict[str, int] | None = None, **kwargs: Any
    ) -> None:
        """Resolve the mask rules and check the lengths.

        Args:
            *args: Positional arguments of verl's class.
            rules: Mask rules of `opd.tokens.mask_rules`; `role:eos` is the tokenizer's own EOS.
            lengths: Maximum response tokens by data_source; rollout.response_length for all others.
            **kwargs: Keyword arguments of verl's class.

        Raises:
            InvalidInput: A length is not between 1 and rollout.response_length.
        """
        super().__init__(*args, **kwargs)
        self.mask_rules = cached_mask_rules(tuple(rules), self.tokenizer)
        self.lengths = lengths or {}
        longest = self.rollout_config.response_length
        for task, length in self.lengths.items():
            if not 0 < length <= longest:
                raise InvalidInput(
                    f"lengths: {task} is {length}, but it must lie between 1 and "
                    f"rollout.response_length, which is {longest}"
                )

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Sample a response and remove the masked tokens from its response_mask.

        Args:
            sampling_params: Sampling parameters of the server.
            **kwargs: Fields of the prompt's row.

        Returns:
            verl's output.
        """
        task = kwargs.get("data_source")
        if task in self.lengths:
            sampling_params = sampling_params | {"max_tokens": self.lengths[task]}
        output = await super().run(sampling_params, **kwargs)
        if output.response_ids:
            ids, mask = torch.tensor(output.response_ids), torch.tensor(output.response_mask)
            supervised = supervised_mask(ids[None], mask[None].bool(), self.mask_rules)[0]
            output.response_mask = supervised.long().tolist()
        return output


@lru_cache(maxsize=8)
def cached_mask_rules(rules: tuple[str, ...], tokenizer: Any) -> list[ResolvedMaskRules]:
    """Resolve the rules to the tokenizer's ids once; verl creates a new loop per response."""
    return resolve_mask_rules(rules, tokenizer, [tokenizer.eos_token_id])
