"""What a device has: from made-up trees of files, and from this machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.device import cpu_features, cpu_quota, detect, has_battery, physical_cores, usable_cores, usable_threads

linux = pytest.mark.skipif(platform.system() != "Linux", reason="reads Linux's own files")


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("cores", "quota", "threads"),
    [(4, None, 4), (4, 0.5, 1), (4, 1.0, 1), (4, 1.9, 1), (4, 2.0, 2), (4, 8.0, 4), (1, None, 1), (1, 0.01, 1)],
)
def test_threads_are_cores_within_the_quota(cores: int, quota: float | None, threads: int) -> None:
    assert usable_threads(cores, quota) == threads


def test_quota_of_control_groups_2(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/shop/web\n")
    group = tmp_path / "sys/fs/cgroup"
    (group / "shop/web").mkdir(parents=True)
    assert cpu_quota(tmp_path) is None
    (group / "shop/web/cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (group / "shop/cpu.max").write_text("150000 100000\n")  # a limit above counts as well
    assert cpu_quota(tmp_path) == 1.5
    (group / "shop/web/cpu.max").write_text("50000 100000\n")
    assert cpu_quota(tmp_path) == 0.5


def test_quota_of_control_groups_1_within_a_container(tmp_path: Path) -> None:
    """The path is the host's, the files are at the root."""
    write(tmp_path, proc__self__cgroup="4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    group = tmp_path / "sys/fs/cgroup/cpu"
    group.mkdir(parents=True)
    (group / "cpu.cfs_period_us").write_text("100000")
    (group / "cpu.cfs_quota_us").write_text("-1")
    assert cpu_quota(tmp_path) is None
    (group / "cpu.cfs_quota_us").write_text("200000")
    assert cpu_quota(tmp_path) == 2.0


@linux
def test_memory_is_the_smaller_limit(tmp_path: Path) -> None:
    write(tmp_path, proc__self__cgroup="0::/a\n")
    (tmp_path / "sys/fs/cgroup/a").mkdir(parents=True)
    whole = detect(tmp_path).memory
    assert whole is not None
    (tmp_path / "sys/fs/cgroup/a/memory.max").write_text("268435456")
    assert detect(tmp_path).memory == 268435456 < whole


@linux
def test_an_arm_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    write(
        tmp_path,
        proc__cpuinfo="processor\t: 0\nFeatures\t: fp asimd evtstrm asimddp i8mm\n\nprocessor\t: 1\n",
    )
    (tmp_path / "proc/device-tree").mkdir()
    (tmp_path / "proc/device-tree/model").write_bytes(b"Raspberry Pi 5 Model B Rev 1.0\0")
    (tmp_path / "dev/dri").mkdir(parents=True)
    (tmp_path / "dev/dri/renderD128").touch()
    device = detect(tmp_path)
    assert device.features == ("neon", "neon-dotprod", "i8mm")
    assert (device.board, device.accelerators) == ("Raspberry Pi 5 Model B Rev 1.0", ("/dev/dri/renderD128",))
    assert not device.battery


@linux
def test_features_of_an_x86_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    write(tmp_path, proc__cpuinfo="flags\t: fpu avx2 avx512f avx512_vnni\n")
    assert cpu_features(tmp_path) == ("avx2", "avx512", "avx512-vnni")
    assert cpu_features(tmp_path / "nothing") == ()


@linux
def test_a_mouse_does_not_make_a_laptop(tmp_path: Path) -> None:
    supplies = tmp_path / "sys/class/power_supply"
    (supplies / "hid").mkdir(parents=True)
    (supplies / "hid/type").write_text("Battery\n")
    (supplies / "hid/scope").write_text("Device\n")
    assert not has_battery(tmp_path)
    (supplies / "BAT0").mkdir()
    (supplies / "BAT0/type").write_text("Battery\n")
    assert has_battery(tmp_path)


@linux
def test_two_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    for number in os.sched_getaffinity(0):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        topology.mkdir(parents=True)
        (topology / "core_id").write_text("0")
        (topology / "physical_package_id").write_text("0")
    assert physical_cores(tmp_path) == 1


def test_the_fingerprint_is_stable_and_tells_devices_apart(tmp_path: Path) -> None:
    assert detect().fingerprint == detect().fingerprint
    write(tmp_path, proc__self__cgroup="0::/a\n")
    (tmp_path / "sys/fs/cgroup/a").mkdir(parents=True)
    before = detect(tmp_path)
    (tmp_path / "sys/fs/cgroup/a/cpu.max").write_text("50000 100000")
    assert detect(tmp_path).fingerprint != before.fingerprint


PROGRAM = "from edge.device import usable_cores; print(usable_cores())"


@linux
def test_affinity_is_respected() -> None:
    one = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {one}),
    )
    assert done.stdout.strip() == "1"


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A real control group of half a CPU, where this user may make one."""
    for parent, files in (
        ("/sys/fs/cgroup/cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}),
        ("/sys/fs/cgroup", {"cpu.max": "50000 100000"}),
    ):
        group = Path(parent, f"ruvltra-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            for name, value in files.items():
                (group / name).write_text(value)
        except OSError:
            group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("no control group may be made here")


@linux
def test_a_container_of_half_a_cpu_gets_one_thread(control_group: Path) -> None:
    def enter() -> None:
        (control_group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, preexec_fn=enter)
    assert done.stdout.strip() == "1"
    assert usable_cores() >= 1
