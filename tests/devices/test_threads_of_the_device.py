"""How many threads the device process computes with: what the machine, its control groups and the user allow."""

from __future__ import annotations

import pytest

from asyncbatch.devices import worker


@pytest.mark.parametrize(
    ("asked", "cores", "threads"),
    [
        ("", 4, 3), ("", 1, 1), ("", 2.0, 1), ("", 2.5, 1), ("", 0.5, 1),
        ("6", 4, 6), ("1", 32, 1), ("4,2", 32, 4), ("0", 4, 3), ("many", 4, 3),
    ],
)  # fmt: skip
def test_one_core_is_left_to_the_host_unless_omp_num_threads_says_how_many(monkeypatch, asked, cores, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(worker, "usable_cores", lambda: cores)
    assert worker.device_threads() == threads


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, []),
        ({"cpu.max": "max 100000"}, []),
        ({"cpu.max": "200000 100000"}, [2.0]),
        ({"cpu.max": "max 100000", "a/b/cpu.max": "150000 100000", "a/cpu.max": "400000 100000"}, [1.5, 4.0]),
        ({"c/cpu.max": "100000 100000"}, []),  # another process's
        ({"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, [2.5]),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ({"cpu.max": "nonsense"}, []),
    ],
)
def test_quotas_of_control_groups_are_read_from_the_own_one_up_to_the_root(tmp_path, files, limits):
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    root = tmp_path / "cgroup"
    root.mkdir()
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    assert sorted(worker._quotas(root, own)) == limits


def test_without_control_groups_the_cores_decide(tmp_path):
    assert list(worker._quotas(tmp_path / "none", tmp_path / "neither")) == []
    assert worker.usable_cores() >= 0.1
