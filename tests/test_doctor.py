"""What the doctor says of this machine, and of worse ones."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from dtmsearch.workflows.doctor import (
    Finding,
    check_bitsandbytes,
    check_disk,
    check_memory,
    check_python,
    check_shared_memory,
    check_sockets,
    check_store,
    examine,
    no_gpu,
    package,
)


def the(findings: Iterable[Finding], name: str) -> Finding:
    return next(f for f in findings if f.name == name)


def test_every_finding_that_is_not_ok_says_what_to_do(tmp_path: Path) -> None:
    assert [f for f in examine(str(tmp_path / "store")) if f.status != "ok" and not f.remedy] == []


def test_the_doctor_leaves_no_trace_where_the_store_will_be(tmp_path: Path) -> None:
    examine(str(tmp_path / "store"))
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_installed_is_missing_with_the_command_that_installs_it() -> None:
    finding = package("no-such-package-here", ">=1.0")
    assert (finding.status, finding.remedy) == ("missing", "pip install 'no-such-package-here>=1.0'")


def test_a_package_that_is_too_old_is_missing() -> None:
    assert package("click", ">=1000").status == "missing"


def test_a_python_that_is_too_old_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert the(check_python(), "python").status == "missing"


def test_a_store_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert the(check_store(str(tmp_path / "file")), "store").status == "missing"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_store_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert the(check_store(str(tmp_path / "store")), "store").status == "missing"


def test_a_bucket_that_can_be_written_is_ok_and_left_as_it_was(tmp_path: Path) -> None:
    finding = the(check_store(tmp_path.as_uri()), "store")
    assert finding.status == "ok" and list(tmp_path.iterdir()) == []


def test_a_bucket_of_an_unknown_kind_is_missing() -> None:
    assert the(check_store("nosuch://bucket/store"), "store").status == "missing"


def test_little_shared_memory_is_a_warning_that_names_the_container_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 26, free=1 << 26))
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    assert "--shm-size" in the(check_shared_memory(), "shared memory").remedy


def test_a_nearly_full_disk_is_a_warning_even_when_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10 << 40, free=100 << 30))
    assert the(check_disk(), "disk for Ray").status == "warning"


def test_a_folder_too_long_for_the_sockets_of_ray_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    assert the(check_sockets(), "ports").status == "missing"


def test_a_driver_with_a_torch_built_without_cuda_is_told_apart_from_no_gpu() -> None:
    with_driver = no_gpu(has_driver=True, built_for=None)
    without = no_gpu(has_driver=False, built_for=None)
    assert "CUDA build" in with_driver.remedy and with_driver.remedy != without.remedy


def test_a_container_with_little_memory_is_a_warning_on_any_host(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {64 << 20} kB\n",
        "/sys/fs/cgroup/memory.max": f"{3 << 30}\n",
        "/sys/fs/cgroup/memory.current": f"{1 << 30}\n",
    }
    monkeypatch.setattr(Path, "is_file", lambda path: str(path) in files)
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert the(check_memory(), "memory").status == "warning"


def test_a_bitsandbytes_that_does_not_load_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    assert the(check_bitsandbytes(), "bitsandbytes works").status == "missing"
