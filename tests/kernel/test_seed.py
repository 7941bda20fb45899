"""The races of seeding, step by step: real maps, and an iterator that shows what a busy host could."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from hostagent import kernel
from hostagent.kernel import abi, bpf, seed
from proxy.model import Namespaces
from tests.kernel.bed import Bed

# no process can have these ids: pid_max is at most 1 << 22
PARENT, CHILD = 5_000_001, 5_000_002


class Passes:
    """What the iterator shows, pass by pass; the last pass is repeated. Labels are those of the maps, as in the
    kernel."""

    def __init__(self, procs: bpf.Map, *passes: list[Callable[[], abi.TaskRow]]) -> None:
        self._procs = procs
        self._passes = list(passes)

    def __iter__(self) -> Iterator[abi.TaskRow]:
        rows = [make() for make in (self._passes.pop(0) if len(self._passes) > 1 else self._passes[0])]
        for row in rows:
            entry = self._procs.get(abi.U32.pack(row.tgid))
            row.known = entry is not None
            row.node = abi.U64.unpack(entry)[0] if entry else 0
        return iter(rows)


def process(tgid: int, parent: int, *, exec_id: int = 1, inode: int = 1) -> Callable[[], abi.TaskRow]:
    return lambda: abi.TaskRow(
        tgid=tgid,
        ns_tgid=tgid,
        parent_tgid=parent,
        parent_ns_tgid=parent,
        exec_id=exec_id,
        inode=inode,
        device=1,
        namespaces=abi.Namespaces(pid=11, mnt=12, net=13, user=14),
    )


@pytest.fixture
def procs(shared: Bed) -> Iterator[bpf.Map]:
    opened = bpf.Map.pinned(shared.settings.pin_dir / "procs", *abi.MAPS["procs"])
    yield opened
    for tgid in (PARENT, CHILD):
        opened.delete(abi.U32.pack(tgid))
    opened.close()


def inodes(shared: Bed, tgid: int) -> list[int]:
    node = shared.pins.node_of(tgid)
    lineage = shared.pins.lineage(node) if node is not None else None
    return [image.inode for image in lineage or ()]


def test_parents_go_before_children(shared: Bed, procs: bpf.Map) -> None:
    passes = Passes(procs, [process(CHILD, PARENT, inode=2), process(PARENT, 0, inode=1)])
    assert seed.seed(shared.settings.pin_dir, passes) == 2
    assert inodes(shared, CHILD) == [1, 2]
    node = shared.pins.node_of(CHILD)
    image = shared.pins.image(node) if node is not None else None
    assert image is not None and image.namespaces == Namespaces(11, 12, 13, 14)


def test_an_execve_between_look_and_label_is_put_right(shared: Bed, procs: bpf.Map) -> None:
    passes = Passes(procs, [process(PARENT, 0, exec_id=1, inode=1)], [process(PARENT, 0, exec_id=2, inode=9)])
    assert seed.seed(shared.settings.pin_dir, passes) == 2
    assert inodes(shared, PARENT) == [9]


def test_a_label_that_the_programs_gave_is_kept(shared: Bed, procs: bpf.Map) -> None:
    own = shared.pins.node_of(1)
    assert own is not None
    procs.put(abi.U32.pack(PARENT), abi.U64.pack(own))
    assert seed.seed(shared.settings.pin_dir, Passes(procs, [process(PARENT, 0, inode=9)])) == 0
    assert shared.pins.node_of(PARENT) == own


def test_a_child_is_not_made_a_root_while_its_parent_is_gone(shared: Bed, procs: bpf.Map) -> None:
    """The kernel shows the dead parent until it shows who adopted the child."""
    passes = Passes(
        procs,
        [process(CHILD, PARENT + 7, inode=2)],
        [process(CHILD, PARENT, inode=2), process(PARENT, 0, inode=1)],
    )
    assert seed.seed(shared.settings.pin_dir, passes) == 2
    assert inodes(shared, CHILD) == [1, 2]


def test_children_of_the_unlabelled_stay_unlabelled(shared: Bed, procs: bpf.Map) -> None:
    procs.put(abi.U32.pack(PARENT), abi.U64.pack(0))
    passes = Passes(procs, [process(PARENT, 0), process(CHILD, PARENT)])
    assert seed.seed(shared.settings.pin_dir, passes) == 0
    assert shared.pins.node_of(CHILD) is None


def test_what_never_comes_to_rest_is_given_up(shared: Bed, procs: bpf.Map, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seed, "_PASSES_MAX", 3)
    with pytest.raises(kernel.KernelError, match="gave up after 3 passes"):
        seed.seed(shared.settings.pin_dir, Passes(procs, [process(CHILD, PARENT + 7)]))
