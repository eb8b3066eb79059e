"""Backends that compute cells: this machine, or a Ray or Dask cluster, all through joblib.

A worker returns its cell to the driver, so a cluster needs no shared file system.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from typing import Any

from diagnostics.errors import InvalidInput
from diagnostics.io.packages import load_package
from diagnostics.io.provenance import ROOT

BACKENDS = ("loky", "ray", "dask")


def compute(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int,
    backend: str = "loky",
    address: str | None = None,
) -> Iterator[Any]:
    """Yield the results of function(*task) as they finish, in any order.

    Args:
        function: Called once per task.
        tasks: Positional arguments of each call.
        jobs: Processes on this machine; on a cluster given by its address, tasks submitted at once.
        backend: "loky", "ray" or "dask".
        address: Address of a running Ray head or Dask scheduler; None starts a local cluster of
            `jobs` processes.

    Yields:
        Results.

    Raises:
        InvalidInput: If the backend is unknown, or an address is given for loky.
        MissingPackage: If the backend's extra is not installed.
    """
    import joblib

    if backend not in BACKENDS:
        raise InvalidInput(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if address is not None and backend == "loky":
        raise InvalidInput(f"address {address} cannot be used with loky; set --backend ray or dask")
    if not tasks:
        return
    with {"loky": _local, "ray": _ray, "dask": _dask}[backend](jobs, address):
        # Ray's backend cannot yield results one by one; submitting in waves keeps finished cells
        wave = jobs if backend == "ray" else len(tasks)
        return_mode = "list" if backend == "ray" else "generator_unordered"
        # in its context, all waves are computed by the same processes
        with joblib.Parallel(n_jobs=jobs, return_as=return_mode, batch_size=1) as parallel:
            for begin in range(0, len(tasks), wave):
                calls = (joblib.delayed(function)(*task) for task in tasks[begin : begin + wave])
                yield from parallel(calls)


@contextmanager
def _local(jobs: int, address: str | None) -> Iterator[None]:
    yield


@contextmanager
def _ray(jobs: int, address: str | None) -> Iterator[None]:
    import joblib

    ray = load_package("ray", "backend ray", "ray")
    size = {} if address else {"num_cpus": jobs}
    # Ray puts the driver's working directory first in the module search path of its workers, where
    # a user's own folder `opd` or `synthetic` would be imported instead of ours
    with chdir(ROOT):
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, **size)
    try:
        load_package("ray.util.joblib", "backend ray", "ray").register_ray()
        with joblib.parallel_config("ray"):
            yield
    finally:
        ray.shutdown()


@contextmanager
def _dask(jobs: int, address: str | None) -> Iterator[None]:
    import joblib

    distributed = load_package("distributed", "backend dask", "dask")
    local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.Client(address) if address else distributed.Client(**local),
        joblib.parallel_config("dask"),
    ):
        yield
