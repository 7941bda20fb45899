"""`intercept` of an agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.policy import PolicyError, load, resolve

AGENTS = """
agents:
  A: {exe: /bin/sh, intercept: all}
  B: {exe: /bin/cat}
  C: {declared_by: A, intercept: targets}
"""


def _load(folder: Path, text: str) -> dict[str, str]:
    (folder / "p.yaml").write_text(text)
    return {agent.name: agent.intercept for agent in load(folder).agents}


def test_it_is_off_unless_said(tmp_path: Path) -> None:
    assert _load(tmp_path, AGENTS) == {"A": "all", "B": "targets", "C": "targets"}


def test_it_is_part_of_the_version(tmp_path: Path) -> None:
    versions = set()
    for text in (AGENTS, AGENTS.replace("intercept: all", "intercept: targets")):
        _load(tmp_path, text)
        versions.add(resolve(load(tmp_path), lambda _name: ()).version)
    assert len(versions) == 2


@pytest.mark.parametrize("word", ["everything", "true", "[all]", "''"])
def test_nothing_else_may_be_written(tmp_path: Path, word: str) -> None:
    with pytest.raises(PolicyError) as raised:
        _load(tmp_path, AGENTS.replace("intercept: all", f"intercept: {word}"))
    assert len(raised.value.problems) == 1 and ":3: " in raised.value.problems[0]
