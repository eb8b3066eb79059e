"""Run the same sweep on a local Ray and Dask cluster, and after a SIGKILL."""

import sys
import time
from pathlib import Path

import pytest

from synthetic.runner import backends
from synthetic.runner import run as study
from tests.helpers.warm_process import start_process

NAME = "bias_variance"
FILES = ("rows.csv", "summary.csv")


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    out = tmp_path_factory.mktemp("serial")
    study.run(NAME, "smoke", out=out)
    return tables(out)


def tables(out: Path) -> list[bytes]:
    return [(out / NAME / "smoke" / name).read_bytes() for name in FILES]


@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_cluster_gives_the_same_bits(
    backend: str, serial: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a working directory with folders of the user that are named as our packages."""
    for package in ("diagnostics", "opd", "synthetic"):
        (tmp_path / "work" / package).mkdir(parents=True)
        (tmp_path / "work" / package / "__init__.py").write_text("raise RuntimeError('not ours')")
    monkeypatch.chdir(tmp_path / "work")
    study.run(NAME, "smoke", jobs=2, out=tmp_path, backend=backend)
    assert tables(tmp_path) == serial


def test_a_running_dask_cluster_is_found_by_its_address(
    serial: list[bytes], tmp_path: Path
) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as running:
        address = running.scheduler_address
        study.run(NAME, "smoke", jobs=2, out=tmp_path, backend="dask", address=address)
        assert all(
            w.status.name == "running" for w in running.workers.values()
        )  # the cluster is not closed
    assert tables(tmp_path) == serial


def test_a_running_ray_cluster_is_found_by_its_address(serial: list[bytes], tmp_path: Path) -> None:
    import ray.cluster_utils

    # no processes that scale the cluster or show its logs: each is an interpreter of its own
    services = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    running = ray.cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, **services}
    )
    try:
        address = running.address
        study.run(NAME, "smoke", jobs=2, out=tmp_path, backend="ray", address=address)
        assert len(running.list_all_nodes()) == 1
    finally:
        running.shutdown()
    assert tables(tmp_path) == serial


def test_a_killed_sweep_keeps_its_finished_cells(serial: list[bytes], tmp_path: Path) -> None:
    arguments = ["run", NAME, "--preset", "smoke", "--jobs", "1", "--out", str(tmp_path)]
    cells = tmp_path / NAME / "cells"
    sweep = start_process(tmp_path, study.main, arguments)
    while not list(cells.glob("*.json")) and sweep.exit_code is None:
        time.sleep(0.01)
    sweep.process.kill()
    sweep.wait()
    stamps = {file: file.stat().st_mtime_ns for file in cells.glob("*.json")}
    assert 1 <= len(stamps) <= 3
    study.run(NAME, "smoke", out=tmp_path)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    assert tables(tmp_path) == serial


def fail_on_two(x: int) -> int:
    if x == 2:
        raise ValueError(f"x is {x}")
    return x


def test_a_failing_cell_names_itself_and_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    with pytest.raises(ValueError, match="x is 2"):
        results.extend(backends.compute(fail_on_two, [(0,), (1,), (2,), (3,)], jobs=1))
    experiment = study.load_experiment(NAME)
    broken = dict(experiment.SETTINGS["smoke"][1], mixing=2.0)
    settings = [experiment.SETTINGS["smoke"][0], broken]
    monkeypatch.setitem(experiment.SETTINGS, "smoke", settings)
    with pytest.raises(
        RuntimeError, match=r'mixing is 2\.0.*.*while measuring the cell .*"mixing": 2\.0'
    ):
        study.run(NAME, "smoke", out=tmp_path)
    assert len(list((tmp_path / NAME / "cells").glob("*.json"))) == 1


def test_unknown_places_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown backend 'slurm'; known: loky, ray, dask"):
        list(backends.compute(fail_on_two, [(0,)], 1, "slurm"))
    with pytest.raises(ValueError, match="address here cannot be used with loky"):
        list(backends.compute(fail_on_two, [(0,)], 1, "loky", "here"))
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"backend ray needs ray: pip install 'opdlab\[ray\]'"):
        list(backends.compute(fail_on_two, [(0,)], 1, "ray"))
