"""What the page of audits says beside its tables, written by hand.

The numbers of the examples are those of tests/opd/objectives/audit/test_trl_losses.py and
test_verl_losses.py.
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
        "Each loss is `ppo_loss` or `distillation_ppo_loss` of the installed verl, on batches "
        "of the audit in the layout that its default trainer sends; advantages, rewards with a "
        "KL and corrections of rollouts come from that trainer's functions. Defaults are those "
        "of verl's configuration files (those of the class DistillationLossConfig differ: k3 as "
        "a policy gradient, and clamps), K is 2, and a distillation loss is audited without "
        "task rewards. A policy loss has the advantage log q - log p of the sampled token "
        "unless a row says otherwise, and the rollouts' log-probabilities as those of the old "
        "policy. One batch is one mini-batch, in one micro-batch. No mode of this version is a "
        "reverse KL on a top-K: that was proposed in several forms, and not merged (9). Not here: "
        "GAE, which needs a critic; Megatron's kernel for the forward KL on a top-K, which "
        "needs parallel ranks.",
    ),
    "examples/verl/reverse_topk.py": (
        "Reverse KLs proposed for verl",
        "Written from public descriptions (`examples/verl/reverse_topk.py`); "
        "[when top-K losses collapse](topk.md) compares them.",
    ),
}
"""Library -> title of its section, text above its table."""

_ROWS = "rows without a supervised token count in the mean over rows (1)"
_PAIR = "on {sampled token, rest} (2)"
_MINI = "divides by the rows of the mini-batch, those without a supervised token included (1)"
_K3 = "the forward KL up to its clamp at 10 (7)"
_SILENT = "the advantage does not depend on the token: noise alone (2)"
_REWARD = "no KL: the sign of log q - log p is lost (3)"
_FORWARD = "KL on the teacher's top-K, not normalised, cut at 0 (4)"
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
    "ours:negative_log_likelihood": "refused in training on the student's own samples, as here; on "
    "responses of others it is their cross-entropy (prefixes)",
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
    "verl:kl": "refused under the name k1, accepted under this one (2)",
    "verl:k1,use_policy_gradient=true": "raises with `rollout_is`: the weights arrive nested, and "
    "this loss does not pad them",
    "verl:abs": "twice the total variation distance: no target of the list (6)",
    "verl:low_var_kl": _K3,
    "verl:k3": f"the default; {_K3}",
    "verl:k3,use_policy_gradient=true": "reverse KL minus forward KL (3)",
    "verl:k2,use_policy_gradient=true": _REWARD,
    "verl:abs,use_policy_gradient=true": _REWARD,
    "verl:forward_kl_topk": _FORWARD,
    "verl:forward_kl_topk,loss_max_clamp=10,log_prob_min_clamp=-10": _FORWARD,
    "verl:forward_kl_topk,use_policy_gradient=true": _SILENT,
    **{
        f"verl:vanilla,adv_estimator=none,use_kl_loss=true,kl_loss_coef=1,kl_loss_type={kind}": note
        for kind, note in {
            "low_var_kl": f"the default of `use_kl_loss`; {_K3}",
            "low_var_kl+": "value of k3, gradient of k2",
            "k1": "log p - log q of samples moves nothing (2)",
            "k1+": "value of k1, gradient of k2",
            "k3+": "value of k3, gradient of k2",
            "abs+": "value of abs, gradient of k2",
        }.items()
    },
    **{
        f"verl:vanilla,loss_agg_mode={mode}": _MINI
        for mode in ("seq-mean-token-sum", "seq-mean-token-mean")
    },
    "verl:vanilla,loss_agg_mode=seq-mean-token-sum-norm": "divides by the longest response of the "
    "micro-batch unless `loss_scale_factor` is set (5)",
    "verl:vanilla,loss_agg_mode=seq-mean-token-sum-norm,loss_scale_factor=3": _MINI,
    "verl:gspo,loss_agg_mode=seq-mean-token-mean": _MINI,
    "verl:sapo": f"always `seq-mean-token-mean`; {_MINI}",
    "verl:sapo,adv_estimator=rloo": f"always `seq-mean-token-mean`; {_MINI}",
    "verl:gspo,adv_estimator=rloo,loss_agg_mode=seq-mean-token-mean": _MINI,
    "verl:geo_mean": "for one advantage a response, as verl says: spreads those of tokens (8)",
    "verl:geo_mean,adv_estimator=rloo": "a mean over the rows of the micro-batch (8)",
    "verl:geo_mean,micro_batches=2": "micro-batches of other sizes or numbers change the step (8)",
    "verl:clip_cov": "leaves out a token of large covariance, if there is one",
    "verl:kl_cov": "its penalty has no gradient where the ratio is 1",
    "verl:vanilla,adv_estimator=remax": "the greedy response, its baseline, has the reward 0 here",
    "verl:vanilla,adv_estimator=grpo": "each group is divided by its deviation; "
    "`norm_adv_by_std_in_grpo=false` is unbiased",
    "verl:vanilla,adv_estimator=opo": "its own reward is in the baseline: of responses of 1 and 2 "
    "tokens, 2/3 and -1/3 of the difference; a group without tokens divides 0 by 0",
    "verl:vanilla,adv_estimator=gpg": "by design: multiplied by rows over rows with a reward not 0",
    **{
        f"verl:vanilla,adv_estimator={kind}optimal_token_baseline": "its own return is in the "
        "baseline, weighted by its own probabilities: the bias shrinks as a group grows"
        for kind in ("", "tir_")
    },
    "verl:vanilla,adv_estimator=rloo,use_kl_in_reward=true,kl_coef=1": "unbiased: the KL of the "
    "whole response is part of its reward, as in TRL's RLOO",
    "verl:vanilla,adv_estimator=rloo_vectorized": "a group of one gives no gradient, in `rloo` "
    "its reward without a baseline",
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
    "verl": {
        "(1) Rows without a supervised token in verl": """
Losses of two rows are 1 and 3. The trainer passes the size of its mini-batch as
`global_batch_size`, so their mean is 2. With a third row whose tokens are all masked it is 4/3: the
rows that `agg_loss` leaves out of the sum stay in the divisor. `token-mean` does not change.
""",
        "(2) Scores without the token": """
The mean of c grad log p(y) over y is c grad 1 = 0 for a c that does not depend on y. Student
p = (1/2, 1/4, 1/4): the scores are 1_y - p = (1/2, -1/4, -1/4), (-1/2, 3/4, -1/4) and
(-1/2, -1/4, 3/4), and their mean, weighted by p, is 0. `k1` as a loss has the gradient of
log p, c = 1; verl refuses it, and not its other name `kl`. The KL on the top-K is a number of
the position, c = KL: with `use_policy_gradient=true` its gradient is noise alone, not a weak
signal as verl's warning says.
""",
        "(3) k2, k3 and abs as rewards": """
`use_policy_gradient=true` with another mode than k1 multiplies the score of y by k2, k3 or abs.
p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), log p/q = ln 2 (1, -1, 0):

| score of y | mean gradient by the three logits |
|---|---|
| k1 | (0.260, -0.217, -0.043), that of the reverse KL |
| k2 = (0.240, 0.240, 0) | (0.030, 0.015, -0.045) |
| k3 = (0.193, 0.307, 0) | (0.010, 0.033, -0.043) |

k2 lowers both tokens on which the models differ, also the second, which the teacher prefers. The
mean of k3 is the reverse KL's gradient minus the forward KL's, (0.25, -0.25, 0), and here raises
the loss that it should lower: descent on it takes from the second token, too. Descent from other
starts ends away from the teacher.
""",
        "(4) The forward KL on the teacher's top-K": """
The sum over S of q log(q/p), cut at 0. At p = q = (1/2, 1/4, 1/4), S the first two ids, the sum is
0 and its gradient q(S) p - q on S is (-1/8, -1/16, 3/16): a student that equals the teacher moves
mass into S, because the sum has its minimum at p(S) = 1. The cut ends this where the sum is
negative: p = (0.5, 0.4, 0.1), q = (0.4, 0.3, 0.3) has the sum -0.176 and no gradient, while its KL
is 0.154. So descent ends where the sum is 0 or less: beside the teacher, with too much mass on S.
Both effects shrink with the teacher's mass outside its top-K.
""",
        "(5) The longest response of a micro-batch": """
Two responses of 1 and 3 tokens. `seq-mean-token-sum-norm` without `loss_scale_factor` divides by
the width of the mask, which in the default trainer is the longest response of the micro-batch.
In one micro-batch both sums are divided by 3; in two, one by 1 and one by 3. Set
`loss_scale_factor` to the response length that the documentation names.
""",
        "(6) abs": """
The mean of sign(log p - log q) grad log p is the gradient of the sum of |p - q|. For p and q as in
(3) it is (0.375, -0.3125, -0.0625). It does not shrink near the teacher: a single gradient has
full size however close the models are.
""",
        "(7) k3 in the loss": """
k3 = q/p - log(q/p) - 1 as a loss has the mean gradient p - q of the forward KL: (0.25, -0.25, 0)
for p and q as in (3), where the reverse KL has (0.260, -0.217, -0.043). It is cut at 10, that
is at q/p above 13.6 or below 1/60000: where the models differ most, a sample has no gradient.
`k2`, or the suffix + in `kl_loss_type`, has the reverse KL's.
""",
        "(8) geo_mean": """
Two tokens with advantages a and b: the loss is -(a + b)/2 times the geometric mean of their
ratios, so that both scores have the weight (a + b)/4. The advantage of the first token then
multiplies the second's score, whose mean is 0, and each row is a mean over its tokens. It also
takes the mean over the rows of a micro-batch, whose losses verl's engines add: rows with losses 1
and 3 give 2 in one micro-batch, 1 + 3 in two.
""",
        "(9) A reverse KL on a top-K": """
The first draft of verl's distillation (verl-project/verl#5041) had one on the union of both
top-K, un-normalised, and its author saw the student leave the support; a proposal on the student's
top-K (#7806), un-normalised too, saw no collapse. What decides beside the support is a line: verl's
function for a loss on a top-K, under which the later one is registered, cuts the loss of a position
at 0. The draft had no such cut at first, then one, before its author took the loss out.
For p = (0.6, 0.4), q = (0.9, 0.1) and K = 1 the sum is 0.6 ln(0.6/0.9) =
-0.243 with the gradient (0.143, -0.143), out of the support at a mass below the teacher's already;
cut, both are 0. So the cut ends the way out as soon as the sum is negative, and pulls nobody back
who has left. At p = q the gradient is p (1[v in S] - p(S)) with and without it, and neither has
a target. `opd audit examples/verl/reverse_topk.py:student_support_cut`, `student_support`, `union`,
`union_absolute` and `union_cut` give the cards.
""",
    },
}
"""Library -> heading -> example by hand."""
