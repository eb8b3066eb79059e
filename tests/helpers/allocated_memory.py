"""Memory that real code allocates, measured by torch's profiler, as an oracle of predictions."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocated_peak(code: Callable[[], object]) -> int:
    """Return the most bytes that `code` had allocated on the CPU at once, beyond the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        code()
    events = [x for x in measured.profiler.kineto_results.events() if x.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
