"""Columns that a training run adds to the rows, besides the metrics of the catalogue."""

COLUMNS: tuple[tuple[str, str], ...] = (
    ("step, task", "number of the step, from 0; name of the task, if the step belongs to one"),
    (
        "loss, grad_norm, lr, skipped",
        "loss and gradient norm before clipping, means over the optimizer steps of the step; "
        "learning rate; number of optimizer steps skipped because of a non-finite gradient",
    ),
    ("seconds/*", "time of rollout, scoring, update and record"),
    (
        "machine/*",
        "tokens_per_second, sampled tokens of all processes over the time of the step; peak_gib, "
        "most memory in use: of the device in this step, on a CPU of the process so far",
    ),
    (
        "cost/*",
        "student_tokens and teacher_sampled_tokens, tokens that each model sampled for the step; "
        "teacher_tokens, tokens of prompts and responses that the teacher read to score them, 0 "
        "for a cache; of all processes, without probes, checks and evaluations",
    ),
    (
        "mask/*",
        "what a rule of `--mask`, or all of them, excludes: share of the sampled tokens "
        "(mask/RULE/tokens), of their absolute costs (signal), of their squared costs (energy)",
    ),
    (
        "grading/readable_share",
        "share of the graded responses in which the grader found an answer; at 0 the run prints "
        "the expected answer format",
    ),
    (
        "data/*",
        "share of the step's prompts that are duplicates (repeated_prompts), that another rank "
        "has too (prompts_on_several_ranks), that begin with two BOS tokens (doubled_bos)",
    ),
    (
        "episodes/*",
        "of games: share won (success), actions per episode (turns), share of inadmissible actions "
        "(invalid_share), share of games in which the environment raised an error (failed_share), "
        "that were not over after max_turns (unfinished_share) or had no room for another turn "
        "(full_share)",
    ),
    (
        "view/*",
        "of a teacher that reads prompts of its own: what its view changes, see `view_effect`, at "
        "the steps of `--view-metrics-every`; what responses copy of it, see `view_copying`",
    ),
    (
        "consistency/loss_*",
        "loss_expected, the loss recomputed independently; loss_error, its distance from the loss "
        "in integer multiples of the rounding error, healthy 0; if it is above 0, loss_negated, "
        "loss_exchanged, loss_denominator are 1 for the cause that explains it",
    ),
    (
        "consistency/sampler_error",
        "root mean square of log student - log sampler over tokens of age 0, in integer multiples "
        "of the rounding error",
    ),
    (
        "consistency/student_*, consistency/teacher_*",
        "a few responses scored again without a batch: rescored, the difference in integer "
        "multiples of the rounding error, healthy below 3; from 3 on also what it depends on: "
        "chance, ids hidden by the attention mask (mask), padding, another row (exchanged); "
        "always: modules with active dropout (training), share of the weights in another "
        "precision than requested (precision); teacher_moved, share of the teacher's weights "
        "that changed",
    ),
    (
        "consistency/grader_*",
        "grader_constant, 1 if all responses have the same reward and so do a correct answer and "
        "an empty one; grader_missing, share without a reward of the responses to problems with an "
        "answer",
    ),
    (
        "update/*",
        "from a sample of the weights: share of the elements with a gradient that the step changed "
        "(moved_share, healthy 1), of the weights with any gradient (reached_share, healthy 1), of "
        "the elements whose model weight is not the optimizer's (unpublished_share); "
        "gradients left from the previous step (leftover_gradient) and lost between micro-batches "
        "(lost_gradient); the last three healthy 0",
    ),
    (
        "gradient/*",
        "of a step with a gradient probe (`--probe-every`), see `gradient_row` below; of layers "
        "below the head (`--probe-blocks`) as gradient/blocks/PATTERN/*",
    ),
    (
        "trl/*",
        "of an observed TRL run: on_policy_share, share of the micro-batches that the student had "
        "just sampled; observed_steps, in TRL's log, number of measured steps since its last line",
    ),
)
"""Names of columns and their description."""
