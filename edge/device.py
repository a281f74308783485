"""What this device offers: processor, cores that may be used, memory, hints of accelerators."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

CACHE = "RUVLTRA_CACHE"  # environment variable: where measurements and compiled models are kept

# Instructions that matter to int8 and fp32 products of matrices, by the names of Linux and of macOS.
_FEATURES = {
    "avx2": ("avx2", "hw.optional.avx2_0"),
    "avx512": ("avx512f", "hw.optional.avx512f"),
    "avx512-vnni": ("avx512_vnni", "hw.optional.avx512vnni"),
    "avx-vnni": ("avx_vnni", ""),
    "amx-int8": ("amx_int8", ""),
    "neon": ("asimd", "hw.optional.neon"),
    "neon-dotprod": ("asimddp", "hw.optional.arm.FEAT_DotProd"),
    "i8mm": ("i8mm", "hw.optional.arm.FEAT_I8MM"),
}
# int8 products in one instruction.
INT8_FEATURES = {"avx512-vnni", "avx-vnni", "amx-int8", "neon-dotprod", "i8mm"}
# What IsProcessorFeaturePresent calls them (winnt.h).
_WINDOWS_FEATURES = {"avx2": 40, "avx512": 41, "neon": 19, "neon-dotprod": 43}


class Device(NamedTuple):
    """What there is.

    Attributes:
        system: ``Linux``, ``Darwin`` or ``Windows``, with the release.
        machine: ``x86_64``, ``aarch64``, ``arm64`` ...
        board: Name of the board or model; empty if it does not say.
        cpu: Brand of the processor.
        features: Instructions that int8 and fp32 products use, of the keys of ``_FEATURES``.
        logical_cores: Hardware threads of the machine.
        physical_cores: Cores of which this process may use a hardware thread.
        quota: CPUs that a container's limit allows; None without a limit.
        memory: Bytes that this process may use: the machine's, or a container's limit.
        battery: It has one.
        accelerators: Hints of GPUs and NPUs: names of device files, or what Apple's chips have.
    """

    system: str
    machine: str
    board: str
    cpu: str
    features: tuple[str, ...]
    logical_cores: int
    physical_cores: int
    quota: float | None
    memory: int | None
    battery: bool
    accelerators: tuple[str, ...]

    @property
    def threads(self) -> int:
        """Cores that are worth a thread: a container of half a CPU gets one."""
        return usable_threads(self.physical_cores, self.quota)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of all of this: what was measured on one device does not count on another."""
        return hashlib.sha256(json.dumps(self._asdict(), sort_keys=True).encode()).hexdigest()[:16]


def detect(root: Path = Path("/")) -> Device:
    """Look at this device; takes some milliseconds.

    Args:
        root: Where ``/proc``, ``/sys`` and ``/dev`` are, on Linux.
    """
    system = platform.system()
    return Device(
        system=f"{system} {platform.release()}",
        machine=platform.machine(),
        board=_board(root),
        cpu=_brand(root),
        features=cpu_features(root),
        logical_cores=os.cpu_count() or 1,
        physical_cores=physical_cores(root),
        quota=cpu_quota(root),
        memory=_memory(root),
        battery=has_battery(root),
        accelerators=_accelerators(root),
    )


def cpu_features(root: Path = Path("/")) -> tuple[str, ...]:
    """Instructions that int8 and fp32 products use, of the keys of ``_FEATURES``."""
    if sys.platform == "darwin":
        return tuple(name for name, (_, key) in _FEATURES.items() if key and _sysctl(key) == "1")
    if sys.platform == "win32":
        import ctypes

        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        return tuple(name for name, number in _WINDOWS_FEATURES.items() if present(number))
    # By the machine, since an emulator shows the file of the other one.
    flags = _cpuinfo(root, "Features" if platform.machine() in ("aarch64", "arm64") else "flags").split()
    return tuple(name for name, (flag, _) in _FEATURES.items() if flag in flags)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that are worth a thread: those of this process's affinity, and no more than a container's limit."""
    return usable_threads(physical_cores(root), cpu_quota(root))


def has_battery(root: Path = Path("/")) -> bool:
    """Whether this device runs on a battery when it is not plugged in."""
    if sys.platform == "darwin":
        return _sysctl("hw.model").startswith("MacBook")
    supplies = (root / "sys/class/power_supply").glob("*/type")
    # A mouse has one as well; its scope is "Device".
    return any(_read(s) == "Battery" and _read(s.parent / "scope") != "Device" for s in supplies)


def cache_folder() -> Path:
    """Where measurements and compiled models are kept; the environment variable ``RUVLTRA_CACHE`` names another."""
    stated = os.environ.get(CACHE)
    if stated:
        return Path(stated)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ruvltra-edge"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "ruvltra-edge"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ruvltra-edge"


def usable_threads(cores: int, quota: float | None) -> int:
    """As many threads as cores, and no more than a container's CPUs; at least one."""
    return max(1, cores if quota is None else min(cores, int(quota)))


def physical_cores(root: Path = Path("/")) -> int:
    """Cores of which this process may use a hardware thread; hardware threads where the system says no more."""
    if sys.platform == "darwin":
        return int(_sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or os.cpu_count() or 1)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for number in allowed:
        topology = root / "sys/devices/system/cpu" / f"cpu{number}" / "topology"
        core, package = _read(topology / "core_id"), _read(topology / "physical_package_id")
        cores.add((package, core) if core else number)
    return max(1, len(cores))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs that the control groups of this process allow, of versions 1 and 2; None without a limit."""
    limits = []
    for folder in _control_groups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _memory(root: Path) -> int | None:
    sizes = []
    for folder in _control_groups(root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if limit.isdecimal():
            sizes.append(int(limit))
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(sizes, default=None)


def _control_groups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control groups and all above them, for a controller."""
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            top = root / "sys/fs/cgroup"
        elif controller in names.split(","):
            top = root / "sys/fs/cgroup" / controller
        else:
            continue
        # Within a container the path may be the host's, which is not mounted here: the root is.
        parts = [part for part in path.split("/") if part and part != ".."]
        folders += [top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return folders


def _brand(root: Path) -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string")
    names = (_cpuinfo(root, "model name"), _cpuinfo(root, "Hardware"), platform.processor(), platform.machine())
    return next((name for name in names if name), "unknown")


def _cpuinfo(root: Path, key: str) -> str:
    """A value of the first processor that has it."""
    try:
        with (root / "proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    except OSError:
        pass
    return ""


def _board(root: Path) -> str:
    if sys.platform == "darwin":
        return _sysctl("hw.model")
    return _read(root / "proc/device-tree/model").rstrip("\0") or _read(root / "sys/class/dmi/id/product_name")


def _accelerators(root: Path) -> tuple[str, ...]:
    if sys.platform == "darwin":
        return ("Apple GPU", "Apple Neural Engine") if platform.machine() == "arm64" else ()
    patterns = ("nvidia[0-9]*", "nvhost-gpu", "dri/renderD*", "kfd", "dxg", "accel/accel*", "apex_*", "hailo*", "rknpu")
    return tuple(sorted(f"/dev/{path.relative_to(root / 'dev')}" for p in patterns for path in (root / "dev").glob(p)))


def _sysctl(name: str) -> str:
    import subprocess  # on macOS alone

    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
