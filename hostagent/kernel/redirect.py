"""The netfilter rules that bring protected connections to the listener, in the network namespace of the caller.

    nat     OUTPUT, PREROUTING  TCP SYNs to protected ports (any address) and to the targets' addresses: REDIRECT
    filter  INPUT               packets to the listener's port that were not redirected: reset
    filter  OUTPUT, FORWARD     SYNs and UDP to the same destinations: rejected; of IPv4, fragments of TCP: dropped

What is redirected has another destination by the time it comes to the filter table, so a SYN that it finds has escaped:
nat looks only at what conntrack takes for the beginning of a connection. conntrack is easily made to believe in a
connection that it has missed (one packet that is no SYN is enough, and a socket that outlives its entry sends one), and
does not reassemble for a raw socket with IP_NODEFRAG.

Everything is in chains and sets of our own, for IPv4 and IPv6; each table's rules go in as one transaction, with
exactly one jump, in front. Rules look at SYNs only, so that connections which exist already go on. The workers' own
connections are exempt if they come from the workers' cgroup, carry the mark, *and* are known to the kernel programs by
their socket (`on_exempt` in bpf/connect.bpf.c): who has CAP_NET_RAW can put any mark on anything at any time.

iptables has two backends, nf_tables and the legacy tables, and a kernel can have rules in both: both apply, in nat and
in filter, and of equals the table that was made last comes first. We use the one that `iptables` is on this host. When
that changes, what we have in the other is taken off once ours is in; `foreign` tells what others have there.

Blind spots: what other tables do before ours (raw, mangle, chains of nftables with another priority), packets that
never pass this namespace's IP layer (AF_PACKET). A connection from outside to a protected port of this host is
redirected too.
"""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hostagent.kernel import abi, cgroups, turn
from hostagent.kernel.settings import KernelError, Scope, Settings
from proxy.model import Endpoint, Prefix

_FAMILIES = (4, 6)
_IPTABLES = {4: "iptables", 6: "ip6tables"}
NF_TABLES, LEGACY = "nf_tables", "legacy"
_PORTS_SET = "hopgate-ports"
_ENDPOINTS_SET = {4: "hopgate-targets-4", 6: "hopgate-targets-6"}
_CHAINS = {
    "nat": {"OUTPUT": "HOPGATE-OUT", "PREROUTING": "HOPGATE-PRE"},
    "filter": {"INPUT": "HOPGATE-IN", "OUTPUT": "HOPGATE-OUT", "FORWARD": "HOPGATE-FWD"},
}
_ESCAPES = ("HOPGATE-OUT", "HOPGATE-FWD")
# not `--syn`: to conntrack a SYN with FIN is invalid and never gets to nat, but not every server minds it
_BEGINS_TCP = "-p tcp --tcp-flags SYN,ACK SYN"
_GOES_ON_TCP = "-p tcp ! --tcp-flags SYN,ACK SYN"
_TIMEOUT_S = 30
_WAIT_S = "5"
_LEGACY_TABLES = {4: "/proc/thread-self/net/ip_tables_names", 6: "/proc/thread-self/net/ip6_tables_names"}


@dataclass(frozen=True, slots=True)
class Rules:
    """What is redirected and who is exempt. `worker_cgroup` is a path from the cgroup2 mount, `exempt` that of the
    pinned program that knows exempt sockets. Both have to exist: the kernel resolves them when the rule is
    installed."""

    listen_port: int
    worker_cgroup: str
    mark: int
    exempt: Path
    ports: tuple[int, ...]
    endpoints: tuple[Endpoint, ...]
    prefixes: tuple[Prefix, ...] = ()

    @classmethod
    def of(cls, settings: Settings, scope: Scope) -> Self:
        """Raises `KernelError` when the worker cgroup is not below the cgroup2 mount."""
        mount = cgroups.mount_point()
        try:
            path = settings.worker_cgroup.relative_to(mount)
        except ValueError as error:
            raise KernelError(f"worker cgroup `{settings.worker_cgroup}` is not below `{mount}`") from error
        exempt = settings.pin_dir / f"program_{abi.MATCHED}"
        return cls(settings.listen_port, str(path), settings.mark, exempt, scope.ports, scope.endpoints, scope.prefixes)


def install(rules: Rules) -> str:
    """Puts sets and rules in, or replaces them in place; never doubles any. Returns what `present` compares with.

    Raises `KernelError`; what was there before is then still complete for the family that failed."""
    _fill_sets(rules)
    for family in _FAMILIES:
        _restore(family, "".join(_table_text(rules, family, table, _saved(family, table)) for table in _CHAINS))
    _remove_strays()
    return _fingerprint()


def present(installed: str) -> bool:
    """Whether rules and sets are exactly as `install` left them. Its argument is what `install` returned."""
    return _fingerprint() == installed


def repair(rules: Rules, installed: str, *, look_at_rules: bool = True) -> list[str]:
    """Puts right what is not as `install` left it, each table as soon as it is found wrong. Says which lines were not
    there (`-`) and which should not have been (`+`). Raises `KernelError`."""
    wanted = installed.splitlines()
    changes: list[str] = []
    for table in _CHAINS if look_at_rules else ():
        for family in _FAMILIES:
            saved = _saved(family, table)
            found = _of_table(saved, family, table)
            change = _compared([line for line in wanted if line.startswith(f"IPv{family} {table}: ")], found)
            if change:
                text = _table_text(rules, family, table, saved)
                try:
                    _restore(family, text)
                except KernelError:
                    # the sets may be gone as well
                    _fill_sets(rules)
                    _restore(family, text)
            changes += change
    if changes:
        _remove_strays()
    change = _compared([line for line in wanted if not line.startswith("IPv")], _of_sets())
    if change:
        _fill_sets(rules)
    return changes + change


def _compared(wanted: list[str], found: list[str]) -> list[str]:
    if wanted == found:
        return []
    changed = [f"- {line}" for line in wanted if line not in found]
    changed += [f"+ {line}" for line in found if line not in wanted]
    return changed or [f"the order of {', '.join(found)}"]


def faults() -> list[str]:
    """What is wrong with the rules and sets that are there, without knowing what they should hold. Raises
    `KernelError`."""
    found: list[str] = []
    for table, jumps in _CHAINS.items():
        for family in _FAMILIES:
            saved = _saved(family, table)
            where = f"IPv{family} {table}"
            for hook, chain in jumps.items():
                places = _jumps(saved, hook, chain)
                if places != [0]:
                    at = f"at {places}, not once and first" if places else "missing"
                    found.append(f"{where}: the jump from {hook} to {chain} is {at}")
                if not any(line.startswith(f"-A {chain} ") for line in saved):
                    found.append(f"{where}: chain {chain} is empty or gone")
    existing = set(_run(["ipset", "list", "-name"]).split())
    return found + [f"set {name} is gone" for name in (_PORTS_SET, *_ENDPOINTS_SET.values()) if name not in existing]


def set_names() -> tuple[str, ...]:
    """The sets that the rules look into."""
    return (_PORTS_SET, *_ENDPOINTS_SET.values())


def notified() -> bool:
    """Whether the kernel tells about changes of the rules (`RulesetEvents`): not with the legacy tables. Raises
    `KernelError`."""
    return all(backend(family) == NF_TABLES for family in _FAMILIES)


def backend(family: int) -> str:
    """Where `iptables` has its rules on this host. Raises `KernelError`."""
    return NF_TABLES if "nf_tables" in _run([_IPTABLES[family], "--version"]) else LEGACY


def foreign() -> list[str]:
    """The rules of others in nat and filter of the backend that we do not use. Raises `KernelError`."""
    return [
        f"IPv{family} {table}: {line}"
        for family in _FAMILIES
        for tool, table in _other(family)
        for line in _saved_by(tool, table)
        if line.startswith("-A ") and "HOPGATE-" not in line
    ]


def remove() -> list[str]:
    """Takes off jumps, chains and sets, as far as they are there; says what. Raises `KernelError`."""
    removed: list[str] = []
    for family in _FAMILIES:
        for table in _CHAINS:
            chains = _remove_from(_IPTABLES[family], table)
            removed += [f"IPv{family} chain {chain} of table {table}" for chain in chains]
    removed += _remove_strays()
    existing = set(_run(["ipset", "list", "-name"]).split())
    for name in (_PORTS_SET, *_ENDPOINTS_SET.values()):
        for one in (name, _fresh(name)):
            if one in existing:
                _run(["ipset", "destroy", one])
                removed.append(f"address set {one}")
    return removed


def _remove_from(tool: str, table: str) -> list[str]:
    """Takes off our jumps and chains of one table; names the chains."""
    removed: list[str] = []
    saved, jumps = _saved_by(tool, table), _CHAINS[table]
    for hook, chain in jumps.items():
        for _ in _jumps(saved, hook, chain):
            _run([tool, "-w", _WAIT_S, "-t", table, "-D", hook, "-j", chain])
    for chain in dict.fromkeys(jumps.values()):
        if _has_chain(saved, chain):
            _run([tool, "-w", _WAIT_S, "-t", table, "-F", chain])
            _run([tool, "-w", _WAIT_S, "-t", table, "-X", chain])
            removed.append(chain)
    return removed


def _remove_strays() -> list[str]:
    """Takes off what we have in the other backend: from before `iptables` was made to mean this one."""
    return [
        f"IPv{family} chain {chain} of table {table}, by {tool}"
        for family in _FAMILIES
        for tool, table in _other(family)
        for chain in _remove_from(tool, table)
    ]


def _other(family: int) -> list[tuple[str, str]]:
    """The tool of the backend that `iptables` is not, with each of its tables that there may be. To ask for a legacy
    table would make it."""
    try:
        legacy = Path(_LEGACY_TABLES[family]).read_text().split()
    except OSError:
        legacy = []
    if not legacy:
        # where we use the legacy tables there would be some, once anything of ours was installed
        return []
    used = backend(family)
    tool = shutil.which(f"{_IPTABLES[family]}-{'legacy' if used == NF_TABLES else 'nft'}")
    if tool is None:
        return []
    return [(tool, table) for table in _CHAINS if used == LEGACY or table in legacy]


# --- sets -------------------------------------------------------------------------------------------------------------


def _fresh(name: str) -> str:
    return f"{name}-new"


def _fill_sets(rules: Rules) -> None:
    members: dict[str, list[str]] = {_PORTS_SET: [str(port) for port in sorted(rules.ports)]}
    kinds = {_PORTS_SET: "bitmap:port range 0-65535"}
    for family in _FAMILIES:
        name = _ENDPOINTS_SET[family]
        kinds[name] = f"hash:net,port family {'inet' if family == 4 else 'inet6'} maxelem 65536"
        places = [(at.address, at.port) for at in sorted(rules.endpoints)]
        places += [(at.network, at.port) for at in sorted(rules.prefixes)]
        members[name] = [
            f"{place},{protocol}:{port}"
            for place, port in places
            if ipaddress.ip_network(place).version == family
            for protocol in ("tcp", "udp")
        ]
    lines: list[str] = []
    for name, kind in kinds.items():
        fresh = _fresh(name)
        # both exist from here on, whatever was left behind; then the filled one takes the place of the old one at once
        lines += [f"create {name} {kind} -exist", f"create {fresh} {kind} -exist", f"flush {fresh}"]
        lines += [f"add {fresh} {member}" for member in members[name]]
        lines += [f"swap {fresh} {name}", f"destroy {fresh}"]
    _run(["ipset", "restore"], "\n".join(lines) + "\n")


# --- rules ------------------------------------------------------------------------------------------------------------


def _restore(family: int, text: str) -> None:
    _run([f"{_IPTABLES[family]}-restore", "--noflush", "--wait", _WAIT_S], text)


def _table_text(rules: Rules, family: int, table: str, saved: list[str]) -> str:
    """What replaces our chains of a table, and the jumps to them unless they are right, as one transaction."""
    matches = (f"-m set --match-set {_PORTS_SET} dst", f"-m set --match-set {_ENDPOINTS_SET[family]} dst,dst")
    # the mark first: that a packet does not have it is told at once
    exempt = (
        f"-m mark --mark {rules.mark:#x} -m cgroup --path {_quoted(rules.worker_cgroup)} "
        f"-m bpf --object-pinned {_quoted(str(rules.exempt))}"
    )
    redirect = f"-j REDIRECT --to-ports {rules.listen_port}"
    unreachable = "icmp-port-unreachable" if family == 4 else "icmp6-port-unreachable"
    bodies = {
        "nat": [
            f"-A HOPGATE-OUT {exempt} -j RETURN",
            *(
                f"-A {chain} -p tcp --syn {match} {redirect}"
                for chain in ("HOPGATE-OUT", "HOPGATE-PRE")
                for match in matches
            ),
        ],
        "filter": [
            f"-A HOPGATE-IN -p tcp --dport {rules.listen_port} -m conntrack ! --ctstate DNAT "
            "-j REJECT --reject-with tcp-reset",
            *(f"-A {chain} -p tcp -f -j DROP" for chain in _ESCAPES if family == 4),
            # nearly every packet there is leaves here
            *(f"-A {chain} {_GOES_ON_TCP} -j RETURN" for chain in _ESCAPES),
            f"-A HOPGATE-OUT {exempt} -j RETURN",
            *(
                f"-A {chain} {what} {match} -j REJECT --reject-with {answer}"
                for chain in _ESCAPES
                for what, answer in ((_BEGINS_TCP, "tcp-reset"), ("-p udp", unreachable))
                for match in matches
            ),
        ],
    }
    jumps = _CHAINS[table]
    # declaring a chain empties it, within the same transaction that fills it
    lines = [f"*{table}", *(f":{chain} - [0:0]" for chain in dict.fromkeys(jumps.values())), *bodies[table]]
    for hook, chain in jumps.items():
        there = _jumps(saved, hook, chain)
        if there != [0]:
            lines += [f"-D {hook} -j {chain}"] * len(there)
            lines.append(f"-I {hook} 1 -j {chain}")
    return "\n".join([*lines, "COMMIT", ""])


def _quoted(path: str) -> str:
    if any(character in path for character in '"\\\n'):
        raise KernelError(f"path `{path}` has a character that iptables-restore cannot take")
    return f'"{path}"'


def _saved(family: int, table: str) -> list[str]:
    return _saved_by(_IPTABLES[family], table)


def _saved_by(tool: str, table: str) -> list[str]:
    return _run([f"{tool}-save", "-t", table]).splitlines()


def _jumps(saved: list[str], hook: str, chain: str) -> list[int]:
    """The places, from 0, of the jumps from a hook to a chain."""
    rules = [line for line in saved if line.startswith(f"-A {hook} ")]
    return [place for place, line in enumerate(rules) if line == f"-A {hook} -j {chain}"]


def _has_chain(saved: list[str], chain: str) -> bool:
    return any(line.startswith(f":{chain} ") for line in saved)


def _fingerprint() -> str:
    parts = [
        line for table in _CHAINS for family in _FAMILIES for line in _of_table(_saved(family, table), family, table)
    ]
    return "\n".join(parts + _of_sets())


def _of_table(saved: list[str], family: int, table: str) -> list[str]:
    where, jumps = f"IPv{family} {table}", _CHAINS[table]
    parts = [f"{where}: {hook} jumps to {chain} at {_jumps(saved, hook, chain)}" for hook, chain in jumps.items()]
    for chain in dict.fromkeys(jumps.values()):
        parts.append(f"{where}: chain {chain} {'is there' if _has_chain(saved, chain) else 'is gone'}")
        parts += [f"{where}: {line}" for line in saved if line.startswith(f"-A {chain} ")]
    return parts


def _of_sets() -> list[str]:
    existing = set(_run(["ipset", "list", "-name"]).split())
    parts: list[str] = []
    for name in (_PORTS_SET, *_ENDPOINTS_SET.values()):
        saved = _run(["ipset", "save", name]).splitlines() if name in existing else [f"set {name} is gone"]
        parts += sorted(line for line in saved if not line.startswith("create "))
    return parts


def _run(command: list[str], text: str = "") -> str:
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_TIMEOUT_S, pass_fds=turn.descriptors()
        )
    except FileNotFoundError as error:
        raise KernelError(f"`{command[0]}` is missing: install `{Path(command[0]).name.split('-')[0]}`") from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"`{' '.join(command)}` did not end within {_TIMEOUT_S} s") from error
    if done.returncode:
        raise KernelError(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")
    return done.stdout
