"""Rules of exact checks: what they watch is 0, or within rounding, in every healthy run.

The columns come from `diagnostics.metrics.support_consistency` and from the trainer (`opd.training.checks.expected_loss`,
`opd.training.checks.rescoring`, `opd.training.checks.step`, `opd.training.checks.update`). A threshold is 0, a number of units of
rounding, or lies far between what is healthy and what the fault gives; none is fitted to runs. So
the false-alarm rate is that of arithmetic worse than the unit of rounding, and of data with copies.
"""

from diagnostics.alarms.rule import AlarmRule

_UNITS = 2.0
"""Whole units of rounding up to which two scorings of the same tokens agree."""

_SUPPORT = (
    AlarmRule(
        name="support_values",
        metric="consistency/support_gap",
        null="0; minus the log of the support's mass if renormalised",
        high=0.02,
        means="the support's log-probability of the sampled token is not the sampled token's own: "
        "the support was renormalised before it was kept, or its numbers are of other ids",
        remedy="keep true log-probabilities; check that ids and numbers are gathered at the same "
        "position",
        need=2,
        last=3,
    ),
    AlarmRule(
        name="support_ids",
        metric="consistency/support_order_share",
        null="0",
        high=0.02,
        means="sampled tokens that rank within the top K are not among the support's ids: the ids "
        "are shifted in position or rank, or some are missing",
        remedy="check that top-K ids and sampled tokens are taken at the same position, and that "
        "the first id is the most probable one",
        need=2,
        last=3,
    ),
    AlarmRule(
        name="support_twice",
        metric="consistency/support_twice_share",
        null="0",
        high=0.0,
        means="the support holds ids twice, so that their mass counts twice",
        remedy="keep each id once; mark what is to be ignored in `present`",
        need=1,
        last=1,
    ),
    AlarmRule(
        name="support_mass",
        metric="consistency/support_mass_over_share",
        null="0",
        high=0.0,
        means="the probability of the support is above 1",
        remedy="look for ids that stand twice, or for log-probabilities that are logits",
        need=1,
        last=1,
    ),
)

_LOSS = (
    AlarmRule(
        name="loss_value",
        metric="consistency/loss_error",
        null="0 multiples of what rounding explains",
        high=0.0,
        means="the loss is not the value of the configured objective on this batch",
        remedy="compare it with consistency/loss_expected: direction of the divergence, sign, mask, "
        "denominator, temperature, and a factor such as the number of micro-batches",
        need=2,
        last=3,
    ),
    AlarmRule(
        name="loss_sign",
        metric="consistency/loss_negated",
        null="0",
        high=0.0,
        means="the loss is the configured one with the opposite sign, so that training climbs",
        remedy="the cost log student - log teacher is minimised; its negative is an advantage",
        need=2,
        last=3,
    ),
    AlarmRule(
        name="loss_direction",
        metric="consistency/loss_exchanged",
        null="0",
        high=0.0,
        means="the loss is the divergence in the other direction: forward KL for reverse, or "
        "student and teacher exchanged",
        remedy="check the order of the arguments of the divergence",
        need=2,
        last=3,
    ),
    AlarmRule(
        name="loss_denominator",
        metric="consistency/loss_denominator",
        null="0",
        high=0.0,
        means="the loss is averaged over another denominator than configured, such as the mean of "
        "micro-batch means",
        remedy="divide by one denominator that is counted over the whole optimizer step",
        need=2,
        last=3,
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
        remedy="check the schedule: its number of steps, and that warm-up starts above 0",
        need=2,
        last=3,
    ),
    AlarmRule(
        name="weights_stuck",
        metric="update/moved_share",
        null="1",
        low=0.5,
        means="an optimizer step was taken and most weights with a gradient did not change: a "
        "learning rate or clip of 0, or updates below the rounding of the weights",
        remedy="check the learning rate and the clip; keep float32 masters of bfloat16 weights",
        need=2,
        last=3,
    ),
    AlarmRule(
        name="weights_unpublished",
        metric="update/unpublished_share",
        null="0",
        high=0.0,
        means="the network does not hold the weights that the optimizer has",
        remedy="copy the masters into the network after every step",
        need=1,
        last=1,
    ),
    AlarmRule(
        name="gradient_partial",
        metric="update/reached_share",
        null="1; 0.5 in the first step of adapters",
        low=0.2,
        means="most of the trained weights get no gradient: layers are frozen or detached",
        remedy="check for no_grad or detach between the layers and the loss, and requires_grad",
        need=2,
        last=3,
    ),
    AlarmRule(
        name="gradient_leftover",
        metric="update/leftover_gradient",
        null="0",
        high=0.0,
        means="gradients of the step before were not zeroed",
        remedy="call zero_grad before the first backward pass of a step",
        need=1,
        last=1,
    ),
    AlarmRule(
        name="gradient_lost",
        metric="update/lost_gradient",
        null="0",
        high=0.0,
        means="gradients of earlier micro-batches are gone at the optimizer step: they are not "
        "accumulated",
        remedy="zero the gradients once a step, not once a micro-batch",
        need=1,
        last=1,
    ),
    AlarmRule(
        name="teacher_moved",
        metric="consistency/teacher_moved",
        null="0",
        high=0.0,
        means="the teacher's weights have changed, though it is frozen",
        remedy="look for tensors that student and teacher share, and for the teacher among the "
        "optimizer's parameters",
        need=1,
        last=1,
    ),
)

_DATA = (
    AlarmRule(
        name="repeated_prompts",
        metric="data/repeated_prompts",
        null="0; the share of copies in the data",
        high=0.5,
        means="most prompts of a step are copies of each other: one prompt fills the data set, or "
        "the data set is smaller than a step",
        remedy="remove copies from the data; check that prompts differ in the column that is read",
        need=2,
        last=3,
    ),
    AlarmRule(
        name="prompts_on_several_ranks",
        metric="data/prompts_on_several_ranks",
        null="0; the share of copies in the data",
        high=0.25,
        means="several processes train on the same prompts",
        remedy="give every rank its own share of the step's prompts",
        need=2,
        last=3,
    ),
    AlarmRule(
        name="doubled_bos",
        metric="data/doubled_bos",
        null="0",
        high=0.0,
        means="prompts begin with the BOS token twice: the template writes one and the tokenizer "
        "adds another",
        remedy="encode templated prompts with add_special_tokens=False, or remove one BOS",
        need=1,
        last=1,
    ),
    AlarmRule(
        name="grader_constant",
        metric="consistency/grader_constant",
        null="0",
        high=0.0,
        need=5,
        last=5,
        means="the grader is constant: it gives all responses of the step one reward, and the same "
        "to the right answer and to no answer",
        remedy="grade the data's own answers; check how the grader wants an answer written",
    ),
    AlarmRule(
        name="reward_missing",
        metric="consistency/grader_missing",
        null="0",
        high=0.0,
        means="responses have no reward (NaN)",
        remedy="check the grader's return value",
        need=1,
        last=1,
    ),
)

_SCORES = (
    AlarmRule(
        name="sampler_unsynced",
        metric="consistency/sampler_error",
        null="0 units of rounding",
        high=_UNITS,
        means="the sampler's log-probabilities are not those of the student: its weights, perhaps "
        "its head alone, were not synced, or it samples at another temperature or precision",
        remedy="sync all weights after each update, tied heads too (lower ahead); compare its "
        "temperature and arithmetic",
        need=2,
        last=3,
    ),
)


def _of_role(role: str) -> tuple[AlarmRule, ...]:
    """The rules about scoring a few responses of one model again."""
    who = f"the {role}'s"
    return (
        AlarmRule(
            name=f"{role}_rescored",
            metric=f"consistency/{role}_rescored",
            null="0 units of rounding",
            high=_UNITS,
            means=f"{who} scores of a few responses differ from those of the same tokens alone, "
            "without padding, in evaluation mode: positions or attention mask under left padding, "
            "dropout, precision, temperature, a stale cache, or another row or model",
            remedy="see the columns of the causes beside it (chance, mask, padding, exchanged, "
            "training, precision); where all are 0, look at what scoring adds to the model",
            need=1,
            last=1,
        ),
        AlarmRule(
            name=f"{role}_dropout",
            metric=f"consistency/{role}_training",
            null="0 modules",
            high=0.0,
            means=f"the {role} scores with dropout: modules are in training mode",
            remedy="call eval() on the network before it scores",
            need=1,
            last=1,
        ),
        AlarmRule(
            name=f"{role}_chance",
            metric=f"consistency/{role}_chance",
            null="0",
            high=_UNITS,
            means=f"{who} scores depend on chance: twice the same batch gives other scores, as "
            "with dropout",
            remedy="call eval() on the network; look for sampling or noise in its layers",
            need=1,
            last=1,
        ),
        AlarmRule(
            name=f"{role}_mask",
            metric=f"consistency/{role}_mask",
            null="0",
            high=_UNITS,
            means=f"{who} scores depend on ids that the attention mask hides: the model ignores it",
            remedy="use an attention implementation that takes a mask, or batches without padding",
            need=1,
            last=1,
        ),
        AlarmRule(
            name=f"{role}_padding",
            metric=f"consistency/{role}_padding",
            null="0",
            high=_UNITS,
            means=f"{who} scores of rows with left padding are wrong and those of others right: "
            "positions are not shifted by the padding",
            remedy="pass position_ids that count real tokens only, and the attention mask",
            need=1,
            last=1,
        ),
        AlarmRule(
            name=f"{role}_exchanged",
            metric=f"consistency/{role}_exchanged",
            null="0",
            high=0.0,
            means=f"{who} scores belong to other rows of the batch",
            remedy="check the order in which answers are put back",
            need=1,
            last=1,
        ),
        AlarmRule(
            name=f"{role}_precision",
            metric=f"consistency/{role}_precision",
            null="0; a few per cent where norms or adapters are float32",
            high=0.5,
            means=f"{who} weights are in another precision than the setting dtype asks for",
            remedy="load or cast it with the asked dtype",
            need=1,
            last=1,
        ),
    )


EXACT: tuple[AlarmRule, ...] = (
    *_SUPPORT,
    *_LOSS,
    *_UPDATE,
    *_DATA,
    *_SCORES,
    *_of_role("student"),
    *_of_role("teacher"),
)
"""Rules of exact checks, in the order of the step's arithmetic."""
