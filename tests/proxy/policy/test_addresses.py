"""Targets by network and by name: what belongs to whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.model import Endpoint, Prefix
from proxy.policy import CompiledPolicy, Document, PolicyError, load, resolve


def document(tmp_path: Path, **addresses: str) -> Document:
    entries = "".join(
        f"  {name}: {{protocol: postgresql, addresses: {given}, credential: c, server_name: s}}\n"
        for name, given in addresses.items()
    )
    (tmp_path / "p.yaml").write_text(f"targets:\n{entries}")
    return load(tmp_path)


def names(name: str) -> list[str]:
    return {"one.internal": ["10.20.0.9"], "two.internal": ["10.20.0.10"]}[name]


def test_networks_are_read_with_and_without_a_port(tmp_path: Path) -> None:
    given = "['10.20.0.0/16:6432', 10.30.0.0/24, '[2001:DB8::/32]:6432', '2001:db8:1::/48', 10.40.0.7/32]"
    (target,) = resolve(document(tmp_path, a=given), names).targets
    assert target.prefixes == (
        Prefix("10.20.0.0/16", 6432),
        Prefix("10.30.0.0/24", 5432),
        Prefix("2001:db8:1::/48", 5432),
        Prefix("2001:db8::/32", 6432),
    )
    assert target.endpoints == (Endpoint("10.40.0.7", 5432),)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("10.20.0.1/16", "has bits beyond its prefix: write `10.20.0.0/16`, or the address alone"),
        ("10.20.0.0/33", "`10.20.0.0/33` is not a network"),
        ("10.20.0.0/255.255.0.0", "wants a prefix length"),
        ("10.20.0.0/", "wants a prefix length"),
        ("0.0.0.0/0", "is every address: use `protect`"),
        ("'::/0'", "is every address: use `protect`"),
        ("'[::ffff:10.0.0.0/104]'", "v4-mapped"),
        ("db.internal/24", "is not a network"),
        ("10.20.0.0/16:0", "is not a port"),
    ],
)
def test_a_network_that_is_none_is_refused_with_its_place(tmp_path: Path, given: str, said: str) -> None:
    with pytest.raises(PolicyError) as raised:
        document(tmp_path, a=given)
    assert len(raised.value.problems) == 1
    assert "p.yaml:2: " in str(raised.value)
    assert said in str(raised.value)


def test_the_longest_prefix_wins(tmp_path: Path) -> None:
    policy = CompiledPolicy(
        resolve(
            document(
                tmp_path,
                wide="10.20.0.0/16",
                narrow="10.20.8.0/24",
                single="10.20.8.7",
                named="one.internal",
                other_port="'10.20.0.0/16:6432'",
                six="'2001:db8::/32'",
            ),
            names,
        ),
        bytes(32),
    )

    def owner(address: str, port: int = 5432) -> str:
        target = policy.target_at(Endpoint(address, port))
        return target.name if target is not None else ""

    assert owner("10.20.1.1") == "wide"
    assert owner("10.20.8.1") == "narrow"
    assert owner("10.20.8.7") == "single"
    assert owner("10.20.0.9") == "named"
    assert owner("10.20.8.7", 6432) == "other_port"
    assert owner("2001:db8:9::1") == "six"
    assert owner("10.21.0.1") == owner("2001:db9::1") == owner("10.20.1.1", 5433) == ""


@pytest.mark.parametrize("second", ["10.20.0.0/16", "'10.20.0.0/16:5432'"])
def test_two_targets_cannot_have_the_same_network(tmp_path: Path, second: str) -> None:
    with pytest.raises(PolicyError, match=r"`10.20.0.0/16:5432` of target `b` is also an address of target `a`"):
        resolve(document(tmp_path, a="10.20.0.0/16", b=second), names)


def test_the_version_does_not_hang_on_what_names_resolve_to(tmp_path: Path) -> None:
    written = document(tmp_path, a="one.internal")
    one = resolve(written, names)
    two = resolve(written, lambda _name: ["10.99.0.1"])
    assert one.version == two.version
    assert one.targets != two.targets
    assert one.targets[0].is_still(two.targets[0])
    other = resolve(document(tmp_path, a="two.internal"), lambda _name: ["10.99.0.1"])
    assert other.version != two.version
    assert resolve(document(tmp_path, a="10.20.0.0/16"), names).version != one.version


def test_a_former_address_is_the_targets_unless_another_has_it(tmp_path: Path) -> None:
    written = document(tmp_path, a="one.internal", b="two.internal")
    resolved = resolve(written, names, lambda name: ["10.20.0.10", "10.20.0.11"] if name == "one.internal" else [])
    by_name = {target.name: {each.address for each in target.endpoints} for target in resolved.targets}
    assert by_name == {"a": {"10.20.0.9", "10.20.0.11"}, "b": {"10.20.0.10"}}
