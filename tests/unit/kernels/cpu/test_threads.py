import multiprocessing
import os
import pathlib
import threading

import pytest
import torch

from kernels.cpu import cgroups, library, threads
from kernels.linear import LinearWeight, linear, pack
from kernels.weights import Encoding
from tests.fixtures.kernels import CPU, random_matrix, random_rows


@pytest.mark.parametrize(
    ("own", "limits", "wanted", "limit"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 3, 4),
        ("0::/", {"cpu.max": "200000 100000"}, 2, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1, 1),
        ("0::/", {"cpu.max": "900000 100000"}, 3, 4),
        ("0::/outer/inner", {"outer/cpu.max": "100000 100000", "outer/inner/cpu.max": "max 100000"}, 1, 1),
        ("0::/of/the/host", {"cpu.max": "200000 100000"}, 2, 2),
        ("3:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "200000"}, 2, 2),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1"}, 3, 4),
        ("3:memory:/\n2:cpu:/", {"memory/cpu.max": "1 1", "cpu/cpu.cfs_quota_us": "150000"}, 1, 2),
        ("", {}, 3, 4),
    ],
)
def test_threads_are_bounded_by_affinity_and_quota(
    own: str, limits: dict[str, str], wanted: int, limit: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads are as many as the allowed cores, at most the allowed processors, within every quota around."""
    (tmp_path / "own").write_text(own)
    for name, content in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
        if name.endswith("quota_us"):
            (tmp_path / name).with_name("cpu.cfs_period_us").write_text("100000\n")
    for cpu, siblings in enumerate(("0,3", "1", "2", "0,3")):
        (tmp_path / f"cpu{cpu}").write_text(siblings)
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(threads, "SIBLINGS", str(tmp_path / "cpu{}"))
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3})

    assert (wanted, limit) == (threads.default_num_threads(), threads.max_num_threads())


@pytest.fixture
def weight(needs_cpu_ops: None) -> LinearWeight:  # noqa: ARG001 a fixture for its effect
    """A weight that takes several blocks."""
    return pack([random_matrix(Encoding.Q4_1, 320, 288)], device=CPU)


def test_threads_may_call_ops_at_once(weight: LinearWeight) -> None:
    """Calls from several Python threads give what they give one after the other, while the pool changes its size."""
    inputs = [random_rows(20, 288, seed=seed) for seed in range(4)]
    wanted = [linear(x, weight) for x in inputs]
    num_threads = library.num_threads()
    wrong: list[int] = []

    def call(index: int) -> None:
        wrong.extend(index for _ in range(50) if not torch.equal(wanted[index], linear(inputs[index], weight)))

    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for count in (1, 3, 2, num_threads):
        library.set_num_threads(count)
    for caller in callers:
        caller.join()

    assert wrong == []


def _call_in_child(weight: LinearWeight, x: torch.Tensor, wanted: torch.Tensor) -> None:
    assert torch.equal(wanted, linear(x, weight))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_ops_work_after_a_fork(weight: LinearWeight) -> None:
    """A forked child, whose worker threads are gone, computes the same and ends."""
    x = random_rows(64, 288)
    num_threads = library.num_threads()
    library.set_num_threads(2)
    wanted = linear(x, weight)
    child = multiprocessing.get_context("fork").Process(target=_call_in_child, args=(weight, x, wanted))
    child.start()
    child.join(timeout=20)
    library.set_num_threads(num_threads)

    assert child.exitcode == 0


def _call_on_one_core(weight: LinearWeight, x: torch.Tensor, wanted: torch.Tensor) -> None:
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    library.set_num_threads(4)
    for _ in range(300):
        assert torch.equal(wanted, linear(x, weight))


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_more_threads_than_cores_work(weight: LinearWeight) -> None:
    """On one core with four threads, where each waits for the others to be scheduled, results are the same and come."""
    x = random_rows(64, 288)
    child = multiprocessing.get_context("fork").Process(target=_call_on_one_core, args=(weight, x, linear(x, weight)))
    child.start()
    child.join(timeout=30)

    assert child.exitcode == 0
