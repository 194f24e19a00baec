"""The CPU budget: the cores that this process may use, and how its parts share them."""

import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc/self")


def usable_cores(proc: Path = _PROC) -> float:
    """The cores that this process may use, perhaps a fraction; never simply those of the host.

    The least of its affinity, which a cpuset narrows too, and of the CPU quotas of its control
    group and of every group around that: https://docs.kernel.org/admin-guide/cgroup-v2.html
    (cpu.max), https://docs.kernel.org/scheduler/sched-bwc.html (v1). `proc` is its folder there.
    """
    quotas = [cores for folder in _groups(proc) if (cores := _quota(folder)) is not None]
    return min([float(len(os.sched_getaffinity(0))), *quotas])


def whole_cores(proc: Path = _PROC) -> int:
    """How many threads the usable cores keep busy: at least one. A fraction gets none of its own:
    with more threads than its quota a group is stopped now and then, in the middle of a batch.
    """
    return max(1, int(usable_cores(proc)))


def _groups(proc: Path) -> list[Path]:
    """The folders of this process's control groups for the CPU, and of those around them."""
    try:
        groups = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return []
    # Version 2 has one hierarchy, named ""; version 1 one for each controller, or for several.
    paths = {
        controller: path
        for _, controllers, path in (line.split(":", 2) for line in groups)
        for controller in controllers.split(",")
    }
    folders = []
    for line in mounts:
        mount, _, kind = line.partition(" - ")
        # What the mount shows of the hierarchy, and where.
        root, point = mount.split()[3:5]
        system, *_, options = kind.split()
        if system == "cgroup2":
            path = paths.get("")
        elif system == "cgroup" and "cpu" in options.split(","):
            path = paths.get("cpu")
        else:
            continue
        if path is None:
            continue
        # In a container the path may be the host's, of which the mount shows the end; or lead out
        # of what the mount shows.
        inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
        top = Path(point)
        folder = top if ".." in inside.parts else top / inside
        folders += [each for each in (folder, *folder.parents) if each.is_relative_to(top)]
    return folders


def _quota(folder: Path) -> float | None:
    """The cores that a control group may use; None where it is not limited."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
    except OSError:
        return None
    # "max" is version 2's word for no limit, -1 is version 1's.
    return None if quota == "max" or int(quota) <= 0 else int(quota) / int(period)


@dataclass(frozen=True)
class Budget:
    """How `cores` are shared. `decode_threads` are those of each acceptor, `run_threads` (ONNX
    Runtime's, for one batch) those of each engine; without `engines`, each acceptor is one.
    """

    cores: float
    acceptors: int
    engines: int
    decode_threads: int
    run_threads: int

    def __str__(self) -> str:
        decoding, running = f"{self.decode_threads} decoding", f"{self.run_threads} running"
        if not self.engines:
            parts = f"{self.acceptors} x {decoding} and {running} threads"
        else:
            parts = (
                f"{self.acceptors} x {decoding} threads, engines {self.engines} x {running} threads"
            )
        return f"{self.cores:.3g} usable cores: acceptors {parts}"


def split(
    cores: float,
    acceptors: int = 1,
    engines: int = 0,
    decode_threads: int = 0,
    run_threads: int = 0,
) -> Budget:
    """The budget for so many processes; threads of 0 are chosen.

    Images are decoded each by itself: all cores may do that while no batch runs. The threads of a
    run wait for one another, and for the slowest: they must not be more than the cores that are
    left by acceptors with engines, which are busy with one core each.
    """
    left = (cores - acceptors) / engines if engines else cores / acceptors
    return Budget(
        cores,
        acceptors,
        engines,
        decode_threads or max(1, int(cores / acceptors)),
        run_threads or max(1, int(left)),
    )
