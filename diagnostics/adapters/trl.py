"""TRL: the panel on an unmodified trainer, from the numbers that its loss really saw.

    with observe(trainer, monitor) as rows:
        trainer.train()

Trainers, and where they are read (TRL 1.16):

| trainer | read | levels |
|---|---|---|
| DistillationTrainer | arguments of its chunked divergence: hidden states, heads, mask | L0 L1 L2 |
| GKDTrainer (experimental) | logits and labels of `generalized_jsd_loss` | L0 L1 L2 |
| GRPOTrainer, beta > 0 | per-token log-probabilities; its reference model is the teacher | L0 |

Subclasses are read as their parents. Functions are wrapped on the trainer itself and put back at
the end; nothing of the trainer is changed and no random number is drawn. A path that does not pass
through what is wrapped (a fused loss) raises instead of reporting nothing.
Shapes: B responses, T response positions, P prompt positions, L = P + T, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diagnostics.adapters.trl_seams import Row, Watch, distillation, gkd, grpo, replaced
from diagnostics.errors import InvalidInput
from diagnostics.monitor import Monitor


@contextmanager
def observe(
    trainer: Any, monitor: Monitor | None = None, *, k: int = 16, elements: int = 2**24
) -> Iterator[list[Row]]:
    """Run the monitor on each optimizer step of the trainer while the context is open.

    Yields the rows, one a step with its number under "step"; a row is complete when the next
    step begins, the trainer logs, or the context closes. The latest row is added to what the
    trainer logs (finite values only). The micro-batches of a step are measured together, so that
    rollouts of one prompt stay one sampling unit. Only training is observed, not evaluation.

    Cost: on steps when the monitor is due, both heads once more for DistillationTrainer, two
    log-softmaxes for GKDTrainer; a copy of the prompt ids to the host.
    With several processes give a monitor with combine=across_ranks, or each rank reports its own.

    Args:
      monitor: `Monitor()` if None.
      k: size of the teacher's top-K support.
      elements: numbers of a (tokens, V) tensor that exist at a time.

    Raises:
      ValueError: the trainer is none of those above, or hides what is needed.
      RuntimeError: while training, a loss did not pass through what is wrapped.
    """
    attach = _seam(trainer)
    watch = Watch(trainer, monitor or Monitor(), k, elements)
    with ExitStack() as stack:
        attach(watch, stack)
        log = trainer.log

        def logged(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
            watch.close(trainer.state.global_step)
            if "loss" in logs and watch.fresh:
                logs |= {
                    n: x for n, x in watch.rows[-1].items() if math.isfinite(x) and n != "step"
                }
                watch.fresh = False
            return log(logs, *args, **kwargs)

        stack.enter_context(replaced(trainer, "log", logged))
        yield watch.rows
        watch.close(trainer.state.global_step)


def _seam(trainer: Any) -> Callable[[Watch, ExitStack], None]:
    """How to attach to this trainer, by the name of its class or of a parent."""
    names = [kind.__name__ for kind in type(trainer).__mro__]
    for fused in ("use_liger_gkd_loss", "use_liger_loss"):
        if getattr(trainer, fused, False):
            raise InvalidInput(
                f"{names[0]}.{fused} is set: the fused loss never makes the logits that are "
                "needed; switch it off to observe this run"
            )
    known = {"DistillationTrainer": distillation, "GKDTrainer": gkd, "GRPOTrainer": grpo}
    for name in names:
        if name in known:
            return known[name]
    raise InvalidInput(f"{names[0]} is not known here; known: {', '.join(known)} and subclasses")
