"""Where cells are computed: this machine, or a Ray or Dask cluster, all through joblib.

A worker returns its cell to the driver, so a cluster needs no shared file system.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from diagnostics.errors import InvalidInput

BACKENDS = ("loky", "ray", "dask")


def compute(
    function: Callable[..., Any],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int,
    backend: str = "loky",
    address: str | None = None,
) -> Iterator[Any]:
    """Results of function(*task) as they finish, in any order.

    Args:
      jobs: processes on this machine; on a cluster given by its address, tasks sent at a time.
      address: of a running Ray head or Dask scheduler; None starts a local cluster of `jobs`.

    Raises:
      ValueError: an unknown backend, or an address for loky.
      ModuleNotFoundError: the backend's extra is not installed.
    """
    import joblib

    if backend not in BACKENDS:
        raise InvalidInput(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if address is not None and backend == "loky":
        raise InvalidInput(f"address {address} needs --backend ray or dask")
    if not tasks:
        return
    with {"loky": _local, "ray": _ray, "dask": _dask}[backend](jobs, address):
        # Ray's backend cannot yield results one by one: waves, so that finished cells are kept
        wave = jobs if backend == "ray" else len(tasks)
        how = "list" if backend == "ray" else "generator_unordered"
        parallel = joblib.Parallel(n_jobs=jobs, return_as=how, batch_size=1)
        for begin in range(0, len(tasks), wave):
            yield from parallel(joblib.delayed(function)(*t) for t in tasks[begin : begin + wave])


@contextmanager
def _local(jobs: int, address: str | None) -> Iterator[None]:
    yield


@contextmanager
def _ray(jobs: int, address: str | None) -> Iterator[None]:
    import joblib

    ray = _extra("ray", "ray")
    size = {} if address else {"num_cpus": jobs}
    ray.init(address=address or "local", include_dashboard=False, log_to_driver=False, **size)
    try:
        _extra("ray.util.joblib", "ray").register_ray()
        with joblib.parallel_config("ray"):
            yield
    finally:
        ray.shutdown()


@contextmanager
def _dask(jobs: int, address: str | None) -> Iterator[None]:
    import joblib

    distributed = _extra("distributed", "dask")
    local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.Client(address) if address else distributed.Client(**local),
        joblib.parallel_config("dask"),
    ):
        yield


def _extra(module: str, extra: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the backend {extra} is not installed: pip install 'opdlab[{extra}]'"
        ) from error
