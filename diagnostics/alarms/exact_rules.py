"""Rules of exact checks: their columns are 0, or within rounding, in every healthy run.

The columns come from `diagnostics.metrics.support_consistency` and from the trainer
(`opd.training.checks.expected_loss`, `opd.training.checks.rescoring`, `opd.training.checks.step`,
`opd.training.checks.update`). A threshold is 0, a number of rounding units, or far between the
healthy values and those of the fault; none is fitted to runs. So false alarms arise only from
arithmetic worse than the rounding unit and from duplicated data.
"""

from diagnostics.alarms.rule import AlarmRule

_MAX_ROUNDING_UNITS = 2.0
"""Rounding units up to which two scorings of the same tokens agree."""

_SUPPORT = (
    AlarmRule(
        name="support_values",
        metric="consistency/support_gap",
        null="0; -log of the support's mass if renormalised",
        high=0.02,
        means="the support's log-probability of the sampled token differs from the token's score: "
        "the support was renormalised before it was stored, or ids and values do not match",
        remedy="store log-probabilities over the full vocabulary; check that ids and values are "
        "gathered at the same position",
        min_outside=2,
        window=3,
    ),
    AlarmRule(
        name="support_ids",
        metric="consistency/support_order_share",
        null="0",
        high=0.02,
        means="sampled tokens within the top K are missing from the support: the ids are shifted "
        "in position or rank, or some are missing",
        remedy="check that top-K ids and sampled tokens come from the same position, and that the "
        "first id is the most probable one",
        min_outside=2,
        window=3,
    ),
    AlarmRule(
        name="support_twice",
        metric="consistency/support_twice_share",
        null="0",
        high=0.0,
        means="the support contains duplicate ids, whose mass counts twice",
        remedy="store each id once; mark entries to ignore in `present`",
        min_outside=1,
        window=1,
    ),
    AlarmRule(
        name="support_mass",
        metric="consistency/support_mass_over_share",
        null="0",
        high=0.0,
        means="the total probability of the support is above 1",
        remedy="look for duplicate ids, or for logits in place of log-probabilities",
        min_outside=1,
        window=1,
    ),
)

_LOSS = (
    AlarmRule(
        name="loss_value",
        metric="consistency/loss_error",
        null="0 times the rounding tolerance",
        high=0.0,
        means="the loss differs from the configured objective on this batch",
        remedy="compare it with consistency/loss_expected: direction of the divergence, sign, "
        "mask, denominator, temperature, and a factor such as the number of micro-batches",
        min_outside=2,
        window=3,
    ),
    AlarmRule(
        name="loss_sign",
        metric="consistency/loss_negated",
        null="0",
        high=0.0,
        means="the loss has the opposite sign of the configured objective, so training maximises "
        "it",
        remedy="minimise the cost log student - log teacher; its negative is an advantage",
        min_outside=2,
        window=3,
    ),
    AlarmRule(
        name="loss_direction",
        metric="consistency/loss_exchanged",
        null="0",
        high=0.0,
        means="the loss is the divergence in the other direction: forward instead of reverse KL, "
        "or student and teacher swapped",
        remedy="check the argument order of the divergence",
        min_outside=2,
        window=3,
    ),
    AlarmRule(
        name="loss_denominator",
        metric="consistency/loss_denominator",
        null="0",
        high=0.0,
        means="the loss denominator is not the configured one, for example a mean of micro-batch "
        "means",
        remedy="use one denominator, counted over the full optimizer step",
        min_outside=2,
        window=3,
    ),
)

_UPDATE = (
    AlarmRule(
        name="learning_rate_zero",
        metric="lr",
        null="above 0",
        low=1e-30,
        z=0.0,
        means="the learning rate is 0",
        remedy="check the number of steps of the schedule, and that warm-up starts above 0",
        min_outside=2,
        window=3,
    ),
    AlarmRule(
        name="weights_stuck",
        metric="update/moved_share",
        null="1",
        low=0.5,
        means="most weights with a gradient did not change in an optimizer step: the learning rate "
        "or max_grad_norm is 0, or updates are below the rounding of the weights",
        remedy="check the learning rate and max_grad_norm; keep float32 copies of bfloat16 weights",
        min_outside=2,
        window=3,
    ),
    AlarmRule(
        name="weights_unpublished",
        metric="update/unpublished_share",
        null="0",
        high=0.0,
        means="the network's weights differ from the optimizer's master weights",
        remedy="copy the master weights into the network after every step",
        min_outside=1,
        window=1,
    ),
    AlarmRule(
        name="gradient_partial",
        metric="update/reached_share",
        null="1; 0.5 in the first step with adapters",
        low=0.2,
        means="most trained weights have no gradient: layers are frozen or detached",
        remedy="check for no_grad or detach between the layers and the loss, and requires_grad",
        min_outside=2,
        window=3,
    ),
    AlarmRule(
        name="gradient_leftover",
        metric="update/leftover_gradient",
        null="0",
        high=0.0,
        means="gradients of the previous step were not zeroed",
        remedy="call zero_grad before the first backward pass of a step",
        min_outside=1,
        window=1,
    ),
    AlarmRule(
        name="gradient_lost",
        metric="update/lost_gradient",
        null="0",
        high=0.0,
        means="gradients of earlier micro-batches are missing at the optimizer step: they are not "
        "accumulated",
        remedy="zero the gradients once a step, not once a micro-batch",
        min_outside=1,
        window=1,
    ),
    AlarmRule(
        name="teacher_moved",
        metric="consistency/teacher_moved",
        null="0",
        high=0.0,
        means="the weights of the frozen teacher have changed",
        remedy="look for tensors shared by student and teacher, and for teacher parameters in the "
        "optimizer",
        min_outside=1,
        window=1,
    ),
)

_DATA = (
    AlarmRule(
        name="repeated_prompts",
        metric="data/repeated_prompts",
        null="0; the share of duplicates in the data",
        high=0.5,
        means="most prompts of a step are duplicates: the data set repeats one prompt, or is "
        "smaller than a step",
        remedy="remove duplicates from the data; check that the prompt column is the right one",
        min_outside=2,
        window=3,
    ),
    AlarmRule(
        name="prompts_on_several_ranks",
        metric="data/prompts_on_several_ranks",
        null="0; the share of duplicates in the data",
        high=0.25,
        means="several ranks train on the same prompts",
        remedy="give every rank a different shard of the step's prompts",
        min_outside=2,
        window=3,
    ),
    AlarmRule(
        name="doubled_bos",
        metric="data/doubled_bos",
        null="0",
        high=0.0,
        means="prompts begin with two BOS tokens: the template writes one and the tokenizer adds "
        "another",
        remedy="encode templated prompts with add_special_tokens=False, or remove one BOS token",
        min_outside=1,
        window=1,
    ),
    AlarmRule(
        name="grader_constant",
        metric="consistency/grader_constant",
        null="0",
        high=0.0,
        min_outside=5,
        window=5,
        means="the grader is constant: all responses of the step, the correct answer and an empty "
        "answer get the same reward",
        remedy="grade the answers of the data set; check which answer format the grader expects",
    ),
    AlarmRule(
        name="reward_missing",
        metric="consistency/grader_missing",
        null="0",
        high=0.0,
        means="responses have no reward (NaN)",
        remedy="check the grader's return value",
        min_outside=1,
        window=1,
    ),
)

_SCORES = (
    AlarmRule(
        name="sampler_unsynced",
        metric="consistency/sampler_error",
        null="0 rounding units",
        high=_MAX_ROUNDING_UNITS,
        means="the sampler's log-probabilities differ from the student's: its weights, or its LM "
        "head alone, were not synced, or it samples at another temperature or precision",
        remedy="sync all weights after each update, including tied heads (lower rollout_lag); "
        "compare its temperature and precision",
        min_outside=2,
        window=3,
    ),
)


def _rescoring_rules(role: str) -> tuple[AlarmRule, ...]:
    """Return the rules about rescoring a few responses of one model."""
    owner = f"the {role}'s"
    return (
        AlarmRule(
            name=f"{role}_rescored",
            metric=f"consistency/{role}_rescored",
            null="0 rounding units",
            high=_MAX_ROUNDING_UNITS,
            means=f"{owner} scores of a few responses differ from scores of the same tokens alone, "
            "without padding, in evaluation mode; possible causes: positions or attention mask "
            "under left padding, dropout, precision, temperature, a stale cache, or another row or "
            "model",
            remedy="see the columns of the possible causes (chance, mask, padding, exchanged, "
            "training, precision); if all are 0, check what scoring adds to the model",
            min_outside=1,
            window=1,
        ),
        AlarmRule(
            name=f"{role}_dropout",
            metric=f"consistency/{role}_training",
            null="0 modules",
            high=0.0,
            means=f"the {role} is scored with dropout: modules are in training mode",
            remedy="call eval() on the network before it scores",
            min_outside=1,
            window=1,
        ),
        AlarmRule(
            name=f"{role}_chance",
            metric=f"consistency/{role}_chance",
            null="0",
            high=_MAX_ROUNDING_UNITS,
            means=f"{owner} scores are not deterministic: scoring the same batch twice gives "
            "different scores, as with dropout",
            remedy="call eval() on the network; look for random operations in its layers",
            min_outside=1,
            window=1,
        ),
        AlarmRule(
            name=f"{role}_mask",
            metric=f"consistency/{role}_mask",
            null="0",
            high=_MAX_ROUNDING_UNITS,
            means=f"{owner} scores depend on masked ids: the model ignores the attention mask",
            remedy="use an attention implementation that supports a mask, or batches without "
            "padding",
            min_outside=1,
            window=1,
        ),
        AlarmRule(
            name=f"{role}_padding",
            metric=f"consistency/{role}_padding",
            null="0",
            high=_MAX_ROUNDING_UNITS,
            means=f"{owner} scores of rows with left padding are wrong, other rows are right: "
            "positions are not shifted by the padding",
            remedy="pass position_ids that count only real tokens, and the attention mask",
            min_outside=1,
            window=1,
        ),
        AlarmRule(
            name=f"{role}_exchanged",
            metric=f"consistency/{role}_exchanged",
            null="0",
            high=0.0,
            means=f"{owner} scores belong to other rows of the batch",
            remedy="check the order in which scores are written back",
            min_outside=1,
            window=1,
        ),
        AlarmRule(
            name=f"{role}_precision",
            metric=f"consistency/{role}_precision",
            null="0; a few percent where norms or adapters are float32",
            high=0.5,
            means=f"{owner} weights do not have the configured dtype",
            remedy="load or cast the model with the configured dtype",
            min_outside=1,
            window=1,
        ),
    )


EXACT: tuple[AlarmRule, ...] = (
    *_SUPPORT,
    *_LOSS,
    *_UPDATE,
    *_DATA,
    *_SCORES,
    *_rescoring_rules("student"),
    *_rescoring_rules("teacher"),
)
"""Rules of exact checks, in the order of the step's computation."""
