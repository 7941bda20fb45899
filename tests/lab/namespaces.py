"""Network namespaces of the test's own: alone, or two that are linked by a wire. Always removed, with the wire."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def namespace(*addresses: str) -> Iterator[str]:
    """The name of a new network namespace with loopback up. `addresses` are put on its loopback device."""
    name = f"hopgate-{uuid.uuid4().hex[:8]}"
    ip("netns", "add", name)
    try:
        # addresses can be used at once, and come and go without waiting for duplicates
        sysctl(name, "net.ipv6.conf.all.accept_dad", "0")
        sysctl(name, "net.ipv6.conf.default.accept_dad", "0")
        ip("-n", name, "link", "set", "lo", "up")
        for address in addresses:
            ip("-n", name, "address", "add", address, "dev", "lo")
        yield name
    finally:
        ip("netns", "delete", name)


@contextmanager
def linked_namespaces(left: str | Sequence[str], right: str | Sequence[str]) -> Iterator[tuple[str, str]]:
    """The names of two namespaces with a wire between them. `left` and `right` are the addresses of the two ends, with
    or without a prefix length (then /24, or /64)."""
    with namespace() as one, namespace() as other:
        ip("link", "add", "wire", "netns", one, "type", "veth", "peer", "name", "wire", "netns", other)
        for name, addresses in ((one, left), (other, right)):
            for address in [addresses] if isinstance(addresses, str) else addresses:
                ip("-n", name, "address", "add", _with_prefix(address), "dev", "wire", *_NODAD[":" in address])
            ip("-n", name, "link", "set", "wire", "up")
        yield one, other


_NODAD: dict[bool, list[str]] = {False: [], True: ["nodad"]}


def _with_prefix(address: str) -> str:
    if "/" in address:
        return address
    return f"{address}/{24 if ipaddress.ip_address(address).version == 4 else 64}"


@contextmanager
def entered(name: str) -> Iterator[None]:
    """The calling thread is in the namespace within the block; sockets that it makes belong there and stay there."""
    with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{name}") as target:
        _setns(target.fileno())
        try:
            yield
        finally:
            _setns(before.fileno())


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter the network namespace: {os.strerror(code)}")


def ip(*arguments: str) -> str:
    """Runs `ip`. Raises `subprocess.CalledProcessError`."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def sysctl(name: str, key: str, value: str) -> None:
    """Sets a kernel parameter of the namespace."""
    subprocess.run(["ip", "netns", "exec", name, "sysctl", "-qw", f"{key}={value}"], check=True, capture_output=True)
