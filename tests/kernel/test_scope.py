"""What is recorded and redirected: ports, endpoints and prefixes, and nothing beside them."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hostagent import kernel
from hostagent.kernel import bpf
from proxy.model import Endpoint, Prefix
from tests.kernel.bed import BEYOND, PORT, Bed, tags
from tests.lab import namespaces

INSIDE = [("203.0.113.77", 7000), ("203.0.113.64", 7000), ("203.0.113.127", 7000), ("2001:db8:9:7::1", 7000)]
PREFIXES = (Prefix("203.0.113.64/26", 7000), Prefix("203.0.113.64/27", 7000), Prefix("2001:db8:9:7::/64", 7000))
OUTSIDE = [("203.0.113.128", 7000), ("203.0.113.63", 7000), ("203.0.113.77", 7001), ("2001:db8:9:8::1", 7000)]


@pytest.fixture(scope="module", autouse=True)
def reachable(shared: Bed) -> None:
    """Everything that is dialled here is an address of the namespace beyond."""
    namespaces.ip("-n", shared.netns, "route", "replace", "203.0.113.0/24", "via", BEYOND[0])
    namespaces.ip("-n", shared.netns, "route", "replace", "2001:db8:9::/48", "via", BEYOND[1])
    for address, _port in OUTSIDE[1:]:
        bits = 128 if ":" in address else 32
        namespaces.ip("-n", shared.beyond, "address", "replace", f"{address}/{bits}", "dev", "lo")


@contextmanager
def scope(made: Bed, **changed: object) -> Iterator[None]:
    with namespaces.entered(made.netns):
        kernel.apply_scope(made.settings, made.pins, dataclasses.replace(made.scope, **changed))
    try:
        yield
    finally:
        with namespaces.entered(made.netns):
            kernel.apply_scope(made.settings, made.pins, made.scope)


@pytest.mark.parametrize(("address", "port"), INSIDE)
def test_whatever_is_in_a_prefix_is_recorded_and_redirected(shared: Bed, address: str, port: int) -> None:
    with scope(shared, prefixes=PREFIXES):
        shared.run(shared.command("connect", address=address, port=port, tag="tag-inside"))
        accepted, lineage = shared.attributed()
    assert tags(lineage) == ["tag-inside"]
    assert accepted.dialled == Endpoint(address, port)


@pytest.mark.parametrize(("address", "port"), OUTSIDE)
def test_what_is_beside_a_prefix_is_left_alone(shared: Bed, address: str, port: int) -> None:
    namespaces.ip("-n", shared.beyond, "address", "replace", f"{address}", "dev", "lo")
    before = shared.pins.counters()["connects"]
    with scope(shared, prefixes=PREFIXES), namespaces.entered(shared.beyond):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, port), family=family) as server:
            server.settimeout(5)
            shared.run(shared.command("connect", address=address, port=port, tag="tag-outside"))
            connection, _peer = server.accept()
            connection.close()
    assert shared.pins.counters()["connects"] == before


def test_datagrams_to_a_prefix_are_rejected(shared: Bed) -> None:
    address, port = INSIDE[0]
    with scope(shared, prefixes=PREFIXES):
        assert shared.run(shared.command("datagram", address=address, port=port)).strip() == "PermissionError"


def test_a_protected_port_counts_for_any_address_and_family(shared: Bed) -> None:
    for address in ("203.0.113.200", "2001:db8:9:ffff::1"):
        shared.run(shared.command("connect", address=address, port=PORT, tag="tag-any"))
        assert shared.tags() == ["tag-any"]


def test_a_prefix_that_goes_leaves_nothing(shared: Bed) -> None:
    def members() -> tuple[frozenset[bytes], str]:
        opened = bpf.Map.pinned(shared.settings.pin_dir / "scope", 24, 4)
        try:
            saved = subprocess.run(["ipset", "save"], check=True, capture_output=True, text=True).stdout
            return frozenset(opened.keys()), "".join(line for line in saved.splitlines(True) if line.startswith("add"))
        finally:
            opened.close()

    with namespaces.entered(shared.netns):
        before = members()
    with (
        scope(shared, prefixes=PREFIXES, endpoints=(Endpoint("203.0.113.70", 7000),)),
        namespaces.entered(shared.netns),
    ):
        assert len(members()[0]) == len(before[0]) + 4
        assert "203.0.113.64/26,tcp:7000" in members()[1]
    with namespaces.entered(shared.netns):
        assert members() == before


def test_what_stays_in_scope_is_redirected_throughout_a_change(shared: Bed) -> None:
    """Clients connect without a pause while the scope is changed again and again: none gets past the listener."""
    address = "203.0.113.77"
    namespaces.ip("-n", shared.beyond, "address", "replace", f"{address}/32", "dev", "lo")
    kept = Endpoint(address, 7000)
    with (
        namespaces.entered(shared.beyond),
        socket.create_server((address, 7000)) as target,
        scope(shared, endpoints=(kept,)),
    ):
        client = shared.start(shared.command("storm", 400, 0, address=address, port=7000, tag="tag-steady"))
        for round_ in range(6):
            extra = tuple(
                Endpoint(f"198.51.100.{number}", 7000) for number in range(1 + 20 * round_, 20 * (round_ + 1))
            )
            with namespaces.entered(shared.netns):
                kernel.apply_scope(
                    shared.settings,
                    shared.pins,
                    dataclasses.replace(shared.scope, endpoints=(kept, *extra), prefixes=PREFIXES[: round_ % 2]),
                )
        seen = 0
        while seen < 400:
            accepted, record = shared.take()
            assert isinstance(record, kernel.ConnectRecord), record
            assert accepted.dialled == kept
            seen += 1
        client.communicate()
        target.settimeout(0.1)
        with pytest.raises(TimeoutError):
            target.accept()
