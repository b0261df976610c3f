"""What a process may take of the machine: memory and processors, within the limits of its container or batch job.

A container of 1.5 GB on a machine of 64 has all of the machine's memory, as the system tells it, until it is killed.
Limits are control groups (v1 and v2); those of every group above the process count too.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

#: Where control groups are mounted, and the groups of this process.
_MOUNTED, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_memory() -> int:
    """Return the bytes that this process can still take before it would swap or be killed."""
    import psutil

    free = [psutil.virtual_memory().available]
    free += [limit - used for limit, used in _memory()]
    return max(0, min(free))


def memory_limit() -> int | None:
    """Return the bytes that the control groups of this process allow them; None where that is all that there is."""
    import psutil

    limit = min((limit for limit, _ in _memory()), default=None)
    return None if limit is None or limit >= psutil.virtual_memory().total else limit


def processors() -> int:
    """Return how many processors this process may use, at least 1: those it may run on, and its share of their time."""
    # A batch system assigns a part of the machine, by affinity or by a quota.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *(round(quota) for quota in _quotas())]))


def limit_own_memory(size: int) -> Callable[[], None]:
    """Have this process fail to allocate more than so many bytes from now on, where the system can do that.

    Otherwise the system kills it without a word when the memory of its container is used up.

    Returns:
        A function that takes the limit back.
    """
    try:
        import resource

        import psutil
    except ImportError:  # Windows has no module `resource`
        return lambda: None
    info = psutil.Process().memory_info()
    if not hasattr(info, "data"):  # only Linux limits what is private and writable, whichever way it is allocated
        return lambda: None
    before = resource.getrlimit(resource.RLIMIT_DATA)
    soft, hard = info.data + size, before[1]
    resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, before)


def _memory() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of each control group that limits memory; cached files do not count as use."""
    for folder in _groups("memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.high", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None and 0 < most < 2**60:  # v1 writes a huge number for no limit
                lines = _text(folder / "memory.stat").splitlines()
                files = [int(n) for name, _, n in (line.partition(" ") for line in lines) if name == cached]
                yield most, max(0, now - sum(files))


def _quotas() -> Iterator[float]:
    """Yield the processors whose time each control group allows, where it limits them."""
    for folder in _groups("cpu"):
        quota, _, period = _text(folder / "cpu.max").strip().partition(" ")  # "max 100000": no limit
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)
        v1, of = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if v1 is not None and v1 > 0 and of:
            yield v1 / of


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups of this process that may limit it, from its own one up."""
    for line in _text(_OWN).splitlines():
        names, _, own = line.partition(":")[2].partition(":")
        if names and controller not in names.split(","):
            continue
        roots = [_MOUNTED / name for name in dict.fromkeys((names, controller))] if names else [
            _MOUNTED, _MOUNTED / "unified",
        ]  # fmt: skip
        for root in roots:
            if root.is_dir():
                path = PurePosixPath(own.lstrip("/"))
                # Within a container the path may be the host's, and the container's own group is mounted at the root.
                yield from (folder for part in (path, *path.parents) if (folder := root / part).is_dir())
                break


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
