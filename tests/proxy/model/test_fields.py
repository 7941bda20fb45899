"""Paths to fields: what is one, what it names, and that nothing is named by accident."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.model.fields import MAX_LENGTH, MAX_STEPS, STAR, BadFieldPath, FieldPath

POD: dict[str, Any] = {
    "kind": "Pod",
    "metadata": {"name": "web", "annotations": {"example.com/owner": "ann", "note": "n"}},
    "spec": {
        "containers": [
            {"name": "a", "env": [{"name": "X", "value": "1"}, {"name": "Y", "valueFrom": {}}]},
            {"name": "b"},
            {"name": "c", "env": [{"name": "Z", "value": "3"}]},
        ]
    },
}


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("data", ("data",)),
        ("data.*", ("data", STAR)),
        ("data[*]", ("data", STAR)),
        ("spec.containers[*].env[*].value", ("spec", "containers", STAR, "env", STAR, "value")),
        ('metadata.annotations["a.b/c"]', ("metadata", "annotations", "a.b/c")),
        ('metadata.annotations["a\\"\\u00e9"].x', ("metadata", "annotations", 'a"é', "x")),
        ('["a b"].c', ("a b", "c")),
        ("spec.$ref.x-y_1", ("spec", "$ref", "x-y_1")),
        ("spec.*.*[*]", ("spec", STAR, STAR, STAR)),
        ('data["*"]', ("data", "*")),
        ('data[""]', ("data", "")),
    ],
)
def test_a_path_is_a_chain_of_keys_and_stars(text: str, steps: tuple[object, ...]) -> None:
    path = FieldPath.parse(text)
    assert path.steps == steps
    assert str(path) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (".data", "nothing before it"),
        ("$.data", "nothing before it"),
        ("{.data}", "nothing before it"),
        ("*", "starts with a star"),
        ("*.x", "starts with a star"),
        ("[*].x", "starts with a star"),
        ("data.", "ends with a dot"),
        ("data..x", "is not a field's name"),
        ("data*", "follows a field's name"),
        ("data.x*", "follows a field's name"),
        ("data.*x", "follows a field's name"),
        ("data[0]", "in brackets stands"),
        ("data['x']", "in brackets stands"),
        ("data[", "in brackets stands"),
        ('data["x"', "in brackets stands"),
        ('data["\\q"]', "as JSON has it"),
        ('data["x"]y', "follows a field's name"),
        ("metadata.annotations.example.com/owner", "in brackets and quotes"),
        ("data. x", "is not a field's name"),
        ("a" * (MAX_LENGTH + 1), "characters"),
        ("a" + ".a" * MAX_STEPS, "steps"),
    ],
)
def test_what_is_no_path_is_refused_with_what_to_write(text: str, words: str) -> None:
    with pytest.raises(BadFieldPath, match=words):
        FieldPath.parse(text)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("spec.containers[*].env[*].value", ["1", "3"]),
        ("spec.containers.*.name", ["a", "b", "c"]),
        ('metadata.annotations["example.com/owner"]', ["ann"]),
        ("metadata.annotations.*", ["ann", "n"]),
        ("metadata.name.*", []),
        ("spec.containers.name", []),
        ("spec.Containers[*].name", []),
        ("status.x", []),
    ],
)
def test_select_names_the_values_in_order(text: str, values: list[str]) -> None:
    assert FieldPath.parse(text).select(POD) == values


@pytest.mark.parametrize(
    ("text", "pointer", "touched"),
    [
        ("data.*", "/data/password", True),
        ("data.*", "/data", True),
        ("data.*", "", True),
        ("data.*", "/metadata/annotations/x", False),
        ("data.*", "/data2/x", False),
        ("data.password", "/data/user", False),
        ("spec.containers[*].env[*].value", "/spec/containers/0/env/3/value", True),
        ("spec.containers[*].env[*].value", "/spec/containers/0/env/-", True),
        ("spec.containers[*].env[*].value", "/spec/containers/0/env/3/name", False),
        ("spec.containers[*].env[*].value", "/spec/containers/0/image", False),
        ('metadata.annotations["a.b/c"]', "/metadata/annotations/a.b~1c", True),
        ('metadata.annotations["a~b"]', "/metadata/annotations/a~0b", True),
        ('metadata.annotations["~1"]', "/metadata/annotations/~01", True),
        ("data.x", "/data/x/inside", True),
        ("data.x", "data/y", True),
    ],
)
def test_a_pointer_touches_what_it_names_holds_or_stands_in(text: str, pointer: str, touched: bool) -> None:
    assert FieldPath.parse(text).touches(pointer) is touched


@given(st.text(max_size=60))
def test_any_text_is_a_path_or_refused(text: str) -> None:
    try:
        path = FieldPath.parse(text)
    except BadFieldPath:
        return
    assert path.steps
    assert path.select({"data": {"x": 1}}) in ([], [{"x": 1}], [1])


@given(st.text(min_size=1, max_size=20))
def test_every_key_can_be_written(key: str) -> None:
    path = FieldPath.parse(f"data[{json.dumps(key)}]")
    assert path.select({"data": {key: 7}}) == [7]
