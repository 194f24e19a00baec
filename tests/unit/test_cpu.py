"""The CPU budget: what a process may use of its host, and how its parts share it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from convoy_service.engine.cpu import Budget, split, usable_cores, whole_cores

POD = "/kubepods/burstable/pod2f4d5c3e-8c1e-4bb2/4a7d1ed414474e4033ac29ccb8653d9b"
SLICE = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod2f4d.slice"
SCOPE = f"{SLICE}/cri-containerd-4a7d1ed4.scope"

V2_MOUNT = "31 23 0:26 / {sys}/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_GROUPS = """\
12:cpuset:{path}
11:cpu,cpuacct:{path}
5:memory:{path}
1:name=systemd:{path}
0::{path}
"""
V1_MOUNTS = """\
900 800 0:60 / {sys} ro,nosuid - sysfs sysfs ro
901 900 0:61 / {sys}/fs/cgroup rw,nosuid - tmpfs tmpfs rw,mode=755
902 901 0:29 {root} {sys}/fs/cgroup/systemd ro - cgroup cgroup rw,xattr,name=systemd
903 901 0:33 {root} {sys}/fs/cgroup/cpu,cpuacct ro master:15 - cgroup cgroup rw,cpu,cpuacct
904 901 0:34 {root} {sys}/fs/cgroup/memory ro master:16 - cgroup cgroup rw,memory
"""
# Both: the controllers are version 1's, and version 2 has none of them.
HYBRID_MOUNTS = """\
31 23 0:28 / {sys}/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / {sys}/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
33 31 0:30 / {sys}/fs/cgroup/cpuacct rw,relatime - cgroup cgroup rw,cpuacct
41 31 0:38 / {sys}/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
HYBRID_GROUPS = "9:name=systemd:/\n2:cpuacct:/\n1:cpu:/batch\n0::/\n"

# What /proc/self/cgroup and /proc/self/mountinfo say, the files below /sys, the cores.
SYSTEMS: dict[str, tuple[str, str, dict[str, str], float]] = {
    "docker, v2, its own namespace": (
        "0::/\n", V2_MOUNT, {"fs/cgroup/cpu.max": "150000 100000\n"}, 1.5,
    ),
    "docker, v2, no limit": ("0::/\n", V2_MOUNT, {"fs/cgroup/cpu.max": "max 100000\n"}, 8),
    "a v2 root, which has no cpu.max": ("0::/\n", V2_MOUNT, {}, 8),
    "kubernetes, v2, the host's namespace": (
        f"0::{SCOPE}\n",
        V2_MOUNT,
        {f"fs/cgroup{SCOPE}/cpu.max": "max 100000\n", f"fs/cgroup{SLICE}/cpu.max": "50000 100000\n"},
        0.5,
    ),
    "nested groups, v2, the outer one narrower": (
        "0::/a/b/c\n",
        V2_MOUNT,
        {
            "fs/cgroup/a/cpu.max": "200000 100000\n",
            "fs/cgroup/a/b/cpu.max": "600000 100000\n",
            "fs/cgroup/a/b/c/cpu.max": "400000 100000\n",
        },
        2,
    ),
    "v2, a group outside of what is mounted": (
        "0::/../other\n", V2_MOUNT, {"fs/cgroup/cpu.max": "300000 100000\n"}, 3,
    ),
    "kubernetes, v1": (
        V1_GROUPS.format(path=POD),
        V1_MOUNTS.replace("{root}", POD),
        {
            "fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
            "fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        2.5,
    ),
    "v1, the host's namespace, limited further out": (
        V1_GROUPS.format(path=POD),
        V1_MOUNTS.replace("{root}", "/"),
        {
            f"fs/cgroup/cpu,cpuacct{POD}/cpu.cfs_quota_us": "-1\n",
            f"fs/cgroup/cpu,cpuacct{POD}/cpu.cfs_period_us": "100000\n",
            "fs/cgroup/cpu,cpuacct/kubepods/cpu.cfs_quota_us": "10000\n",
            "fs/cgroup/cpu,cpuacct/kubepods/cpu.cfs_period_us": "50000\n",
        },
        0.2,
    ),
    "v1, no limit": (
        V1_GROUPS.format(path="/"),
        V1_MOUNTS.replace("{root}", "/"),
        {
            "fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        8,
    ),
    "v1 beside v2": (
        HYBRID_GROUPS,
        HYBRID_MOUNTS,
        {
            "fs/cgroup/cpu/batch/cpu.cfs_quota_us": "400000\n",
            "fs/cgroup/cpu/batch/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "a quota above what the host has": (
        "0::/\n", V2_MOUNT, {"fs/cgroup/cpu.max": "6400000 100000\n"}, 8,
    ),
    "groups, but none mounted": ("0::/\n", "22 1 8:1 / / rw - ext4 /dev/sda1 rw", {}, 8),
    "version 2 mounted, but no group of it": (
        "1:cpu:/\n", V2_MOUNT, {"fs/cgroup/cpu.max": "100000 100000\n"}, 8,
    ),
}  # fmt: skip


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_usable_cores_are_those_that_the_control_groups_leave(
    system: str, tmp_path: Path
) -> None:
    groups, mounts, files, cores = SYSTEMS[system]
    (tmp_path / "cgroup").write_text(groups)
    (tmp_path / "mountinfo").write_text(mounts.replace("{sys}", f"{tmp_path}/sys"))
    for name, text in files.items():
        file = tmp_path / "sys" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert usable_cores(tmp_path) == cores
    assert whole_cores(tmp_path) == max(1, int(cores))


@pytest.mark.usefixtures("eight_cores")
def test_without_control_groups_the_affinity_decides(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == 8


@pytest.fixture
def one_core() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("one_core")
def test_this_process_may_use_no_more_than_its_affinity() -> None:
    assert 0 < usable_cores() <= 1
    assert whole_cores() == 1


@pytest.mark.parametrize(
    ("budget", "decode_threads", "run_threads"),
    [
        (split(1), 1, 1),
        (split(0.3), 1, 1),
        (split(1.5), 1, 1),
        (split(8), 8, 8),
        (split(8, acceptors=2), 4, 4),
        (split(8, acceptors=1, engines=1), 8, 7),
        (split(8, acceptors=2, engines=2), 4, 3),
        (split(2, acceptors=2, engines=1), 1, 1),
        (split(7.5, acceptors=3, engines=1), 2, 4),
        (split(8, decode_threads=3), 3, 8),
        (split(8, run_threads=2), 8, 2),
        (split(2, acceptors=4, engines=4, decode_threads=5, run_threads=6), 5, 6),
    ],
    ids=str,
)
def test_cores_are_split_between_decoding_and_running(
    budget: Budget, decode_threads: int, run_threads: int
) -> None:
    assert (budget.decode_threads, budget.run_threads) == (decode_threads, run_threads)


def test_a_budget_says_what_it_is_in_a_line() -> None:
    assert str(split(7.5, acceptors=3, engines=2)) == (
        "7.5 usable cores: acceptors 3 x 2 decoding threads, engines 2 x 2 running threads"
    )
