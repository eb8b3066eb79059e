"""Columns of a row that no metric of the catalogue makes: what a training run adds to the panel."""

COLUMNS: tuple[tuple[str, str], ...] = (
    ("step, task", "number of the step, from 0; name of its task, where a step belongs to one"),
    (
        "loss, grad_norm, lr, skipped",
        "loss and norm of the gradient before clipping, means over the step's optimizer steps; "
        "learning rate; optimizer steps not taken because their gradient was not finite",
    ),
    ("seconds/*", "time of rollout, scoring, update and record"),
    (
        "mask/*",
        "what a rule of `--mask`, or all of them, takes away: share of the sampled tokens "
        "(mask/RULE/tokens), of their absolute costs (signal), of their squared costs (energy)",
    ),
    (
        "grading/readable_share",
        "share of the graded responses in which the grader could read an answer; at 0 the run "
        "says what the grader expects",
    ),
    (
        "data/*",
        "share of the step's prompts that are copies of another (repeated_prompts), that another "
        "process has too (prompts_on_several_ranks), that begin with BOS twice (doubled_bos)",
    ),
    (
        "episodes/*",
        "of games: share won (success), actions of an episode (turns), share of actions that the "
        "game did not admit (invalid_share), share of games in which the environment raised an "
        "error (failed_share), that were not over after max_turns (unfinished_share) or left no "
        "room for another turn (full_share)",
    ),
    (
        "consistency/loss_*",
        "loss_expected, the loss by formulas of its own; loss_error, the distance of the loss from "
        "it in whole multiples of what rounding explains, healthy 0; where it is above, "
        "loss_negated, loss_exchanged, loss_denominator are 1 for the cause that explains it",
    ),
    (
        "consistency/sampler_error",
        "root mean square of log student - log sampler over fresh tokens, in whole units of "
        "rounding",
    ),
    (
        "consistency/student_*, consistency/teacher_*",
        "a few responses scored again, each alone: rescored, the difference in whole units of "
        "rounding, healthy below 3; from there on also what it depends on: chance, ids that the "
        "attention mask hides (mask), padding, another row (exchanged); always: modules that drop "
        "something out (training), share of the weights in another precision than asked "
        "(precision); teacher_moved, share of the teacher's numbers that have changed",
    ),
    (
        "consistency/grader_*",
        "grader_constant, 1 if all responses have one reward and so have a right answer and none; "
        "grader_missing, share of responses without a reward",
    ),
    (
        "update/*",
        "from a sample of the weights: share of the numbers with a gradient that the step changed "
        "(moved_share, healthy 1), of the weights with any gradient (reached_share, healthy 1), of "
        "the numbers that the network does not have from its optimizer (unpublished_share); "
        "gradients left from the step before (leftover_gradient) and lost between micro-batches "
        "(lost_gradient); the last three healthy 0",
    ),
    (
        "gradient/*",
        "of a step with a gradient probe (`--probe-every`), see `gradient_row` below; of layers "
        "below the head (`--probe-blocks`) as gradient/blocks/PATTERN/*",
    ),
    (
        "trl/*",
        "of an observed TRL run: on_policy_share, share of the rows that the student had just "
        "sampled; observed_steps, in TRL's log, how many of the steps since its last line were "
        "measured",
    ),
)
"""Names of columns, and what they hold."""
