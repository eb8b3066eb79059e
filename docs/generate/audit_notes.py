"""What the page of audits says beside its tables, written by hand.

The numbers of the examples are those of tests/opd/auditing/test_trl_losses.py.
"""

from opd.objectives.catalogue import COLLAPSING, SUPPORTS

INTRODUCTIONS: dict[str, tuple[str, str]] = {
    "ours": (
        "Compositions of opdlab",
        "Every objective of `opd train` with K = 2, forms that collapse and known errors included, "
        "and the settings that change what is estimated. The trainer refuses known errors and asks "
        "for `--allow-collapse` before the `_unnormalised` and `_published_tail` forms. Supports "
        "that the vocabulary of targets does not have, such as the union of both top-K, are "
        "`biased` here by definition: no listed target is their own.",
    ),
    "trl": (
        "TRL",
        "Each loss is the installed trainer's own method, on batches of the audit. Its models are "
        "tables of logits at the trainer's temperature, its teacher is computed without gradient, "
        "its advantages come from its own code for rollouts. Not here: MiniLLM, which this version "
        "does not have; AsyncGRPO, whose advantages are computed beside vLLM, and A2PO, which "
        "first estimates a value of every prompt; kernels of liger, which need a GPU. SDFT's "
        "default of 100 ids, which would need worlds of a large vocabulary.",
    ),
    "verl": (
        "verl",
        "Each loss is the installed library's own function, on batches of the audit.",
    ),
}
"""Library -> title of its section, text above its table."""

_ROWS = "rows without a supervised token count in the mean over rows (1)"
_PAIR = "on {sampled token, rest} (2)"
_TOPK = "KL on the teacher's top-K: no target of the list, and not unique outside S"

NOTES: dict[str, str] = {
    "ours:sampled_token,baseline=position_mean": "the baseline is a mean over the whole batch: the "
    "trainer computes it before it splits",
    **{
        f"ours:{source}_topk{form}": note
        for source in SUPPORTS
        for form, note in {
            **COLLAPSING,
            "_and_sampled": "the support changes with the sample: no single target",
            "_stopped": "the head of the full gradient without the rest; rests at the teacher and "
            "elsewhere",
        }.items()
    },
    **{
        f"ours:{source}_topk{form}": f"KL on the {source} of both top-K: no target of the list"
        for source in ("union", "intersection")
        for form in ("", "_bucket")
    },
    "ours:k1": "refused in training: minimising log p - log q of samples moves nothing",
    "ours:kl_advantage": "refused in training: an advantage without the action moves nothing",
    "trl:GKD": "the default temperature of 0.9 is for sampling only: the loss scores at 1",
    "trl:GOLD": "samples and scores at 0.9, teacher too: the divergence of these two",
    "trl:GOLD,use_uld_loss=true": "compares sorted probabilities (3); the first token of a "
    "response has no loss (4)",
    "trl:GOLD,use_uld_loss=true,uld_use_hybrid_loss=true": "the first token of a response has "
    "no loss (4)",
    "trl:GOLD,use_uld_loss=true,uld_use_hybrid_loss=true,uld_token_merge_strategy=bayesian": "the "
    "last token, such as the EOS, has no loss by default",
    "trl:GOLD,use_uld_loss=true,uld_use_hybrid_loss=true,uld_token_merge_strategy=bayesian,"
    "uld_skip_student_eos=false,uld_skip_teacher_eos=false": f"each response has equal weight; "
    f"{_ROWS}",
    "trl:ServerDistillation": f"reverse KL {_PAIR}",
    "trl:ServerDistillation,beta=0.5": f"JSD {_PAIR}, with the teacher's first token",
    "trl:ServerDistillation,beta=0,loss_top_k=2": f"forward {_TOPK}",
    "trl:ServerDistillation,beta=0,loss_top_k=2,loss_add_tail=false": f"forward {_TOPK}",
    "trl:AsyncDistillation,teacher_top_k=2": "forward KL on the teacher's top-K and the sampled "
    "token, which vLLM adds to its answer: the support changes with the sample",
    "trl:AsyncDistillation,beta=1,teacher_top_k=2": f"reverse KL {_PAIR}",
    "trl:IW-OPD": "by design: weights of a token follow from the advantages of all (5)",
    "trl:IW-OPD,iw_opd_gamma=0,use_vllm=true": "advantages against the sampler's "
    "log-probabilities, without a ratio",
    "trl:IW-OPD,distillation_objective=jsd": f"reverse KL {_PAIR}",
    "trl:IW-OPD,distillation_objective=jsd,reverse_kl_top_1_mode=argmax": "K = 1",
    "trl:GRPO": "three times the rewards give the same gradient: each group is divided by its "
    "deviation (6)",
    "trl:GRPO,loss_type=grpo": f"as GRPO; {_ROWS}",
    "trl:GRPO,reward_weights=0,beta=1": "the penalty alone, multiplied by the ratio (default)",
    "trl:GRPO,reward_weights=0,beta=1,use_bias_correction_kl=false": "k3 as a loss is the forward "
    "KL (7)",
    "trl:GRPO,scale_rewards=batch": "rewards are divided by the deviation of the batch, which rows "
    "without a token change too",
    "trl:GRPO,scale_rewards=none,loss_type=cispo": "a fifth of the step, without a ratio (8)",
    "trl:GRPO,scale_rewards=none,loss_type=grpo": f"{_ROWS}",
    "trl:GRPO,scale_rewards=none,loss_type=dr_grpo": f"divides by rows times "
    f"`max_completion_length`; {_ROWS}",
    "trl:GRPO,scale_rewards=none,loss_type=luspo": f"{_ROWS}",
    "trl:GRPO,scale_rewards=none,loss_type=sapo": f"{_ROWS}",
    "trl:GRPO,scale_rewards=none,top_entropy_quantile=0.5": "by design: only tokens of high "
    "entropy have a policy gradient",
    "trl:GMPO": f"as GRPO; {_ROWS}",
    "trl:RLOO": "unbiased: the KL of the whole response is part of its reward, so that an earlier "
    f"teacher multiplies later scores, whose mean is 0; {_ROWS}",
    "trl:RLOO,beta=0": f"{_ROWS}",
    "trl:RLOO,reward_weights=0,beta=1": "unbiased, as RLOO: more noise than credit for later costs "
    "only",
    "trl:SDFT,distillation_topk=2": "JSD on the student's top-K: no target of the list, and not "
    f"unique outside S; {_ROWS}",
    "trl:SDPO": f"each response has equal weight; {_ROWS}",
}
"""TARGET of `opd audit` -> note; (1) and so on are the examples below the table."""

EXAMPLES: dict[str, dict[str, str]] = {
    "trl": {
        "(1) Rows without a supervised token": """
Losses of two rows are 1 and 3; their mean is 2. A third row whose tokens are all masked, such as
a truncated one or one for which SDPO has no demonstration, makes the mean 4/3: the same gradient
with a smaller step, in proportion to how many rows are masked. GKD, GOLD, Distillation and GRPO's
`dapo` divide by supervised tokens and do not change.
""",
        "(2) A KL between the sampled token and the rest": """
At `beta=1`, trainers whose teacher is a server, and IW-OPD's `jsd` with its default `loss_top_k=1`,
use the teacher's probability of the sampled token y only: the divergence is that of two events,
{y, everything else}. Student p = (1/2, 1/4, 1/4), teacher q = (1/4, 1/2, 1/4):

| | gradient by the three logits | |
|---|---|---|
| KL(p, q) | ln 2 (0.375, -0.3125, -0.0625) | (0.260, -0.217, -0.043) |
| mean over y of the loss | ln 3 (0.156, -0.109, -0.047) | (0.172, -0.120, -0.051) |

The quotients are 0.66, 0.56 and 1.19: no multiple. The gradient is 0 where student and teacher
agree, and descent ends there; it is not that of the reverse KL which `beta=1` names with a local
teacher.
""",
        "(3) Sorted probabilities": """
Student (0.7, 0.2, 0.1), teacher (0.1, 0.2, 0.7): sorted, both are (0.7, 0.2, 0.1). The loss is 0,
while the KL is 0.6 ln 7 = 1.17. That is the price of comparing two vocabularies without a
mapping; with a common one, use `uld_use_hybrid_loss=true` or no ULD.
""",
        "(4) The first token of a response": """
`uld_token_merge_strategy=observed`, the default, reads the logits at the positions of the
response's tokens, which predict the tokens after them. In a response of tokens 1, 2, 3 the logits
that predict token 1 are those of the prompt's last position: they get gradient 0, those that
predict 2 and 3 get one. `bayesian` reads one position earlier: then those that predict 1 and 2
get one, and token 3, the EOS, only with `uld_skip_student_eos=false,uld_skip_teacher_eos=false`.
""",
        "(5) Weights of IW-OPD": """
Advantages log q - log p of two tokens are a and b. The second's weight is
1 + gamma |b| / (|a| + |b|). With gamma = 0.5 and b = 1 it is 1.25 for a = 1 and 1.1 for a = 4:
another teacher at the first token changes the gradient at the second. It also grows with |b|
itself, which the mean over the second token does not undo. gamma = 0 gives the token reverse KL.
""",
        "(6) Groups divided by their deviation": """
Rewards (0, 1) and (0, 100) of two groups give the same advantages, -0.71 and 0.71: the mean is
the gradient of no expected reward. `scale_rewards=none` gives that of the expected reward.
""",
        "(7) k3 in the loss": """
At the sampled token, k3 = q/p - log(q/p) - 1. Differentiated as it stands, its mean gradient is
`p - q`, that of the forward KL: for p = (1/2, 1/4, 1/4) and q = (1/4, 1/2, 1/4) it is
(0.25, -0.25, 0), where the reverse KL has (0.260, -0.217, -0.043). Multiplied by the ratio of
student and sampler, which TRL does by default, it is the reverse KL's.
""",
        "(8) CISPO's default range": """
The ratio is cut at `epsilon_high`, which is `epsilon` = 0.2 unless it is set: on policy each ratio
is 1 and becomes 0.2, and so does every ratio above 0.2. What is left is a policy gradient with a
fifth of the step and no correction for older rollouts. `epsilon_high=5` keeps ratios up to 5.
""",
    },
}
"""Library -> heading -> example by hand."""
