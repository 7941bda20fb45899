"""The rules hold in either backend of iptables, and in one of them at a time."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from hostagent import kernel
from hostagent.kernel import probe, redirect
from proxy.model import Endpoint
from tests.kernel.bed import BEYOND, Bed, bed
from tests.lab import namespaces

_NAMES = [f"{tool}{what}" for tool in ("iptables", "ip6tables") for what in ("", "-save", "-restore")]


def _use(monkeypatch: pytest.MonkeyPatch, directory: Path, backend: str) -> None:
    """What `update-alternatives` does, for this process."""
    there = directory / backend
    there.mkdir(exist_ok=True)
    for name in _NAMES:
        if not (there / name).exists():
            (there / name).symlink_to(f"/usr/sbin/xtables-{backend}-multi")
    monkeypatch.setenv("PATH", f"{there}:/usr/sbin:/usr/bin:/sbin:/bin")


def _ours(netns: str, backend: str) -> list[str]:
    with namespaces.entered(netns):
        saved = [
            subprocess.run([f"{tool}-{backend}-save"], check=True, capture_output=True, text=True).stdout
            for tool in ("iptables", "ip6tables")
        ]
    return [line for line in "".join(saved).splitlines() if line.startswith("-A") and "HOPGATE" in line]


def _served_and_closed(made: Bed) -> None:
    for address in BEYOND:
        made.run(made.command("connect", address=address, tag="tag-served"))
        accepted, record = made.take()
        assert isinstance(record, kernel.ConnectRecord), record
        assert accepted.dialled == Endpoint(address, 5432)
    assert made.run(made.command("datagram")).strip() in ("PermissionError", "ConnectionRefusedError")


def test_legacy_tables_redirect_heal_and_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _use(monkeypatch, tmp_path, "legacy")
    with bed("legacy") as made:
        assert _ours(made.netns, "legacy") and not _ours(made.netns, "nft")
        _served_and_closed(made)
        with namespaces.entered(made.netns):
            assert not redirect.notified()
            assert probe.backends() == ({4: "legacy", 6: "legacy"}, [])
            assert redirect.faults() == []
            rules = redirect.Rules.of(made.settings, made.scope)
            installed = redirect.install(rules)
            for tool in ("iptables", "ip6tables"):
                subprocess.run([tool, "-w", "-t", "nat", "-F"], check=True)
                subprocess.run([tool, "-w", "-D", "OUTPUT", "-j", "HOPGATE-OUT"], check=True)
            assert len(redirect.repair(rules, installed)) > 4
            assert redirect.present(installed) and redirect.repair(rules, installed) == []
        _served_and_closed(made)
        with namespaces.entered(made.netns):
            kernel.cleanup(made.settings.pin_dir)
        assert not _ours(made.netns, "legacy")


@pytest.mark.parametrize(("before", "after"), [("nft", "legacy"), ("legacy", "nft")])
def test_a_host_that_changes_its_backend_has_the_rules_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str, after: str
) -> None:
    _use(monkeypatch, tmp_path, before)
    with bed("backend") as made:
        _use(monkeypatch, tmp_path, after)
        with namespaces.entered(made.netns):
            installed = redirect.install(redirect.Rules.of(made.settings, made.scope))
            assert redirect.present(installed)
        assert _ours(made.netns, after) and not _ours(made.netns, before)
        _served_and_closed(made)
        # and when nothing was installed since the change
        _use(monkeypatch, tmp_path, before)
        with namespaces.entered(made.netns):
            kernel.cleanup(made.settings.pin_dir)
            assert "hopgate" not in subprocess.run(["ipset", "list", "-name"], capture_output=True, text=True).stdout
        assert not _ours(made.netns, before) and not _ours(made.netns, after)


def test_looking_makes_no_legacy_table(shared: Bed) -> None:
    with namespaces.entered(shared.netns):
        assert probe.backends() == ({4: "nf_tables", 6: "nf_tables"}, [])
        assert redirect.install(redirect.Rules.of(shared.settings, shared.scope))
        assert Path("/proc/thread-self/net/ip_tables_names").read_text() == ""


def test_rules_of_others_in_the_other_backend_are_found() -> None:
    """A table that is made later comes first, and takes away what is ours: this is what the doctor warns of."""
    elsewhere = ["-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", BEYOND[0], "-j", "DNAT", "--to", f"{BEYOND[0]}:6000"]
    with bed("foreign") as made:
        with namespaces.entered(made.netns):
            subprocess.run(["iptables-legacy", "-w", *elsewhere], check=True)
        with namespaces.entered(made.beyond):
            server = socket.create_server((BEYOND[0], 6000))
        with server:
            server.settimeout(10)
            made.run(made.command("connect", tag="tag-gone"))
            gone, _ = server.accept()
            assert gone.recv(100).endswith(b"tag-gone\n")
            gone.close()
        with namespaces.entered(made.netns):
            used, foreign = probe.backends()
            assert used == {4: "nf_tables", 6: "nf_tables"}
            assert foreign == [
                f"IPv4 nat: -A OUTPUT -d {BEYOND[0]}/32 -p tcp -j DNAT --to-destination {BEYOND[0]}:6000"
            ]
