"""YAML in place of JSON: read as Kubernetes reads it, or refused with the place."""

from __future__ import annotations

import pytest

from proxy.protocols.kubernetes.yaml import YamlUnreadable, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("22:22", "22:22"),
        ("2020-01-01", "2020-01-01"),
        ("yes", True),
        ("y", True),
        ("off", False),
        ("'no'", "no"),
        ("0777", 511),
        ("0x1F", 31),
        ("-7", -7),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("1.2.3", "1.2.3"),
        ("1e", "1e"),
        ("~", None),
        ("", None),
        ("null", None),
        ("nothing", "nothing"),
        ("[a, {b: 1}]", ["a", {"b": 1}]),
    ],
)
def test_scalars_are_what_kubernetes_takes_them_for(text: str, value: object) -> None:
    assert read_yaml(f"k: {text}\n".encode()) == {"k": value}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: &x 1\nb: *x", "line 1: anchors"),
        ("a: 1\na: 2", "line 2: the key `a` is there twice"),
        ("a:\n  1: 2", "line 2: a key is no string"),
        ("a: .inf", "no number that JSON has"),
        ("a: !!binary aGk=", "the tag"),
        ("a: !!python/object:os.system x", "the tag"),
        ("--- 1\n--- 2", "more than one document"),
        ("", "empty"),
        ("[" * 200, "nested too deeply"),
        ("a: [", "line [12]: "),
        ("a: " + "x" * 64 * 1024, "more than"),
    ],
)
def test_what_could_be_read_differently_or_grows_is_refused(text: str, why: str) -> None:
    with pytest.raises(YamlUnreadable, match=why):
        read_yaml(text.encode())
    with pytest.raises(YamlUnreadable):
        read_yaml(b"a: \xff")
