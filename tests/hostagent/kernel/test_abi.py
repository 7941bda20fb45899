from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostagent.kernel import abi
from hostagent.kernel.cgroups import Paths, container
from hostagent.kernel.settings import MapSizes, Settings
from proxy.model import Endpoint


def test_a_mapped_address_is_the_same_key_as_the_plain_one() -> None:
    dest = Endpoint("192.0.2.2", 5432)
    plain = abi.connect_key(Endpoint("192.0.2.1", 7), dest, local=True)
    assert abi.connect_key(Endpoint("::ffff:192.0.2.1", 7), dest, local=True) == plain
    assert abi.connect_key(Endpoint("192.0.2.1", 7), dest, local=False) != plain


def test_a_key_of_two_families_is_refused() -> None:
    with pytest.raises(ValueError, match="two families"):
        abi.connect_key(Endpoint("192.0.2.1", 7), Endpoint("2001:db8::1", 7), local=True)


def test_a_port_and_an_endpoint_are_different_members_of_the_scope() -> None:
    members = {abi.scope_key(5432), abi.scope_key(Endpoint("0.0.0.0", 5432)), abi.scope_key(Endpoint("::", 5432))}
    assert len(members) == 3


def test_device_numbers_are_those_of_stat() -> None:
    device = os.stat("/bin/true").st_dev
    assert abi.st_dev(abi.s_dev(device)) == device
    assert abi.st_dev(8 << 20 | 300) == os.makedev(8, 300)


@pytest.mark.parametrize(
    ("stored", "length", "expected"),
    [
        (b"", 0, ((), False)),
        (b"", 9, ((), True)),
        (b"a\0b c\0", 6, (("a", "b c"), False)),
        (b"a\0\0", 3, (("a", ""), False)),
        (b"a\0bcd", 90, (("a", "bcd"), True)),
        (b"\xff\0", 2, (("\udcff",), False)),
    ],
)
def test_arguments(stored: bytes, length: int, expected: tuple[tuple[str, ...], bool]) -> None:
    node = abi.Node(argv_length=length, argv_stored=len(stored))
    node.argv[: len(stored)] = list(stored)
    assert abi.split_argv(node) == expected


def test_a_cgroup_is_found_by_its_inode_also_when_it_is_new_or_renamed(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    assert paths.path(tmp_path.stat().st_ino) == "/"
    made = tmp_path / "a" / "b"
    made.mkdir(parents=True)
    inode = made.stat().st_ino
    assert paths.path(inode) == "/a/b"
    made.rename(tmp_path / "c")
    assert paths.path(inode) == "/c"
    (tmp_path / "c").rmdir()
    assert paths.path(inode) == ""


HEX = "3f" * 32


@pytest.mark.parametrize(
    "path",
    [
        f"/system.slice/docker-{HEX}.scope",
        f"/docker/{HEX}",
        f"/system.slice/docker-{HEX}.scope/init",
        f"/docker/{'a0' * 32}/kubelet/kubepods/besteffort/pod7d3f5a1e/{HEX}",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7d.slice/cri-containerd-{HEX}.scope",
        f"/kubepods.slice/kubepods-pod7d.slice/crio-{HEX}.scope/container",
        f"/kubepods/burstable/pod7d3f5a1e-0000-4000-8000-000000000000/{HEX}",
        f"/system.slice/containerd.service/kubepods-besteffort-pod7d.slice:cri-containerd:{HEX}",
        f"/default/{HEX}",
        f"/machine.slice/libpod-{HEX}.scope/container",
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{HEX}.scope",
        f"/libpod_parent/libpod-{HEX}",
        f"/system.slice/nerdctl-{HEX}.scope",
    ],
)
def test_the_container_of_a_cgroup(path: str) -> None:
    assert container(path) == HEX


def test_the_container_of_a_cgroup_of_runc_has_the_name_that_its_caller_chose() -> None:
    assert container("/user.slice/user-0.slice/session-1.scope/runc-build-7.scope") == "build-7"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/system.slice/docker.service",
        "/system.slice/ci.service/docker-build",
        f"/machine.slice/libpod-conmon-{HEX}.scope",
        f"/libpod_parent/conmon-{HEX}",
        f"/machine.slice/machine-libpod_pod_{HEX}.slice",
        "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7d.slice",
        f"/jobs/{HEX[:-1]}",
        f"/jobs/{HEX}f",
        f"/jobs/{HEX.upper()}",
    ],
)
def test_a_cgroup_of_no_container(path: str) -> None:
    assert container(path) == ""


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="mark"):
        Settings(Path("/c"), Path("/p"), 1, Path("/w"), mark=0)
    with pytest.raises(ValueError, match="graveyard"):
        MapSizes(nodes=10, graveyard=10)
