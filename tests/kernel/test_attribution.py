"""Whoever connects is known when the listener accepts: exactly, and whatever became of the process since."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from hostagent import kernel
from proxy.model import Endpoint, Namespaces
from tests.kernel.bed import BEYOND, PORT, Bed, bed, tags
from tests.lab import cgroups

SPAWNERS = 4
CONNECTS = 10_000
EXECUTED = 400
NAMESPACES = ("pid", "mnt", "net", "user")


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_quick_connects_are_attributed_without_a_miss(shared: Bed, family: int) -> None:
    """Ten thousand for each family, by processes that exit at once; every one says who it is, and the kernel agrees."""
    number, executed = (CONNECTS - EXECUTED) // SPAWNERS, EXECUTED // SPAWNERS
    spawners = [
        shared.start(
            shared.command("storm", number, executed, address=BEYOND[family], tag=f"tag-{index}"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for index in range(SPAWNERS)
    ]
    outcomes: Counter[str] = Counter()
    try:
        for _ in range(CONNECTS):
            accepted, record = shared.take()
            if isinstance(record, kernel.Refused):
                outcomes[f"missing: {record.reason}"] += 1
                continue
            lineage = shared.pins.lineage(record.node)
            if lineage is None:
                outcomes["missing: lineage"] += 1
            elif record.tgid != accepted.tgid or tags(lineage)[-1] != accepted.tag:
                outcomes["wrong"] += 1
            else:
                outcomes["right"] += 1
    finally:
        for spawner in spawners:
            spawner.wait(30)
    assert outcomes == {"right": CONNECTS}
    assert not shared.pins.overflowed()


def test_an_orphan_keeps_its_lineage(shared: Bed) -> None:
    """Double fork, setsid, parent and grandparent dead, then execve."""
    shared.run(shared.command("orphan", tag="tag-orphan"))
    assert shared.tags() == ["tag-orphan", "tag-orphan-leaf"]


def test_a_mapped_address_is_plain_ipv4(shared: Bed) -> None:
    shared.run(shared.command("connect", address=f"::ffff:{BEYOND[0]}", tag="tag-mapped"))
    accepted, lineage = shared.attributed()
    assert tags(lineage) == ["tag-mapped"]
    assert accepted.dialled == Endpoint(BEYOND[0], PORT)


def test_a_thread_connects_as_its_process(shared: Bed) -> None:
    shared.run(shared.command("thread", tag="tag-thread"))
    assert shared.tags() == ["tag-thread"]


def test_execve_in_a_thread_that_is_not_the_leader_makes_an_image(shared: Bed) -> None:
    shared.run(shared.command("thread_exec", tag="tag-thread"))
    assert shared.tags() == ["tag-thread", "tag-thread-after"]


def test_posix_spawn_makes_a_child_image(shared: Bed) -> None:
    shared.run(shared.command("spawn", tag="tag-parent"))
    assert shared.tags() == ["tag-parent", "tag-parent-spawned"]


def test_a_client_that_resets_at_once_is_attributed(shared: Bed) -> None:
    shared.run(shared.command("reset", tag="tag-reset"))
    _accepted, record = shared.take()
    assert isinstance(record, kernel.ConnectRecord), record
    lineage = shared.pins.lineage(record.node)
    assert lineage is not None and tags(lineage) == ["tag-reset"]


def test_an_image_says_what_was_executed(shared: Bed) -> None:
    command = shared.command("connect", tag="tag-image")
    shared.run(["/usr/bin/env", "-u", "X", *command])
    image = shared.attributed()[1][-1]
    assert image.argv == tuple(command)
    assert not image.argv_truncated
    assert image.path == command[0]
    assert image.uid == 0
    assert image.cgroup == f"/{shared.cgroup.name}"


def test_an_image_says_which_namespaces_it_was_executed_in(shared: Bed) -> None:
    here = Namespaces(*(os.stat(f"/proc/self/ns/{kind}").st_ino for kind in NAMESPACES))
    told = 'cd /proc/self/ns; stat -L -c %i pid mnt net user; cd /; exec "$@"'
    others = ["unshare", "--pid", "--fork", "--mount-proc", "--user", "--map-root-user"]
    said = shared.run([*others, "/bin/sh", "-c", told, "tag-told", *shared.command("connect", tag="tag-inside")])
    _accepted, record = shared.take()
    assert isinstance(record, kernel.ConnectRecord), record
    lineage = shared.pins.lineage(record.node)
    assert lineage is not None
    entered, unshared, shell, inside = lineage[-4:]
    assert inside.namespaces == shell.namespaces == Namespaces(*map(int, said.split()))
    assert entered.namespaces == here
    # unshare(1) was executed before it made them
    assert unshared.namespaces is not None and inside.namespaces is not None
    assert unshared.namespaces == msgspec.structs.replace(here, net=inside.namespaces.net)
    assert not set(msgspec.structs.astuple(here)) & set(msgspec.structs.astuple(inside.namespaces))


def test_long_arguments_are_cut_and_say_so(shared: Bed) -> None:
    shared.run(shared.command("connect", tag="tag-" + "x" * 5000))
    image = shared.attributed()[1][-1]
    assert image.argv_truncated
    assert sum(len(word) + 1 for word in image.argv) <= 257


def test_a_record_is_taken_once(shared: Bed) -> None:
    shared.run(shared.command("connect", tag="tag-once"))
    accepted, record = shared.take()
    assert isinstance(record, kernel.ConnectRecord)
    assert isinstance(shared.pins.take(accepted.peer, accepted.dialled), kernel.Refused)


def test_a_process_outside_the_cgroup_is_redirected_and_unattributed(shared: Bed) -> None:
    with cgroups.cgroup("elsewhere") as elsewhere:
        shared.run(shared.command("connect", tag="tag-outside"), cgroup=elsewhere)
        accepted, record = shared.take()
    assert accepted.tag == "tag-outside"
    assert isinstance(record, kernel.Refused)
    assert "no record" in record.reason


def test_one_source_port_for_two_destinations_is_never_mistaken(shared: Bed) -> None:
    """conntrack has to give the second connection another source port; who it is is still told exactly."""
    source = 40_123
    seen = []
    for index, address in enumerate([BEYOND[0], "192.0.2.77", "192.0.2.78"]):
        shared.run(shared.command("from_port", source, address=address, tag=f"tag-{index}"))
        accepted, lineage = shared.attributed()
        assert tags(lineage) == [f"tag-{index}"]
        assert accepted.dialled.address == address
        seen.append(accepted.peer.port)
    assert len(set(seen)) > 1, "conntrack rewrote no port: this test shows nothing"


def test_older_processes_have_their_place() -> None:
    """A parent and its child that run before the programs are loaded, and what they start later."""
    with bed("seed", load=False) as made:
        process = made.start(made.command("child_on_line", tag="tag-old"))
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        made.load()
        for line, expected in (
            ("self", ["tag-old", "tag-old-child"]),
            ("fork", ["tag-old", "tag-old-child"]),
            ("exec", ["tag-old", "tag-old-child", "tag-old-child-later"]),
        ):
            process.stdin.write(line + "\n")
            process.stdin.flush()
            accepted, record = made.take()
            assert isinstance(record, kernel.ConnectRecord), (line, record)
            assert record.tgid == accepted.tgid
            lineage = made.pins.lineage(record.node)
            assert lineage is not None
            assert tags(lineage) == expected
            assert lineage[0].tgid == 1
            older = next(image for image in lineage if "tag-old" in image.argv)
            inodes = [os.stat(f"/proc/{process.pid}/ns/{kind}").st_ino for kind in NAMESPACES]
            assert older.namespaces == lineage[-1].namespaces == Namespaces(*inodes)
        process.communicate()
        assert process.returncode == 0


def test_older_processes_of_a_pid_namespace_have_their_place() -> None:
    """Loaded by a daemon that knows its neighbours by other numbers than the kernel programs do."""
    with bed("pidns", load=False) as made:
        (made.cgroup / "daemon").mkdir()
        daemon = (
            "import subprocess, sys; from pathlib import PosixPath; from hostagent import kernel\n"
            "from hostagent.kernel import MapSizes, Scope, Settings\nfrom proxy.model import Endpoint\n"
            f"older = subprocess.Popen({made.command('child_on_line', tag='tag-old')!r}, "
            "stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
            "assert older.stdout.readline() == 'ready\\n'\n"
            f"kernel.start({made.settings!r}, {made.scope!r})\nolder.communicate('self\\nexec\\n')"
        )
        command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", daemon]
        process = made.start(command, cwd=Path(kernel.__file__).parents[2])
        made.listener.settimeout(30)
        accepted = [made.accept(), made.accept()]
        process.communicate()
        assert process.returncode == 0
        made.load()
        for one, expected in zip(accepted, ([], ["tag-old-child-later"]), strict=True):
            record = made.pins.take(one.peer, one.dialled)
            assert isinstance(record, kernel.ConnectRecord), record
            lineage = made.pins.lineage(record.node)
            assert lineage is not None
            assert tags(lineage) == ["tag-old", "tag-old-child", *expected]
            assert lineage[0].argv[:2] == (sys.executable, "-c"), "process 1 of the namespace is the root"
            assert len({image.namespaces for image in lineage}) == 1
            assert lineage[0].namespaces is not None
            assert lineage[0].namespaces.pid not in (0, os.stat("/proc/self/ns/pid").st_ino)


def test_processes_that_start_while_the_programs_are_loaded_are_labelled() -> None:
    with bed("busy", load=False) as made:
        stop = threading.Event()

        def busy() -> None:
            while not stop.is_set():
                subprocess.run(["/bin/sh", "-c", "/bin/true & /bin/true; wait"], check=True)

        thread = threading.Thread(target=busy)
        thread.start()
        try:
            made.load()
            made.run(made.command("spawn", tag="tag-busy"))
            assert made.tags() == ["tag-busy", "tag-busy-spawned"]
        finally:
            stop.set()
            thread.join()


def test_an_overflow_denies_and_says_so() -> None:
    """With more images than the table holds, the process that found no room is unlabelled, and so is what it starts."""
    sizes = kernel.MapSizes(procs=8192, nodes=700, graveyard=100, connects=1024)
    with bed("overflow", sizes) as made:
        made.run(["/usr/bin/env"] * 900 + made.command("connect", tag="tag-full"))
        _accepted, record = made.take()
        assert isinstance(record, kernel.Refused)
        assert "no lineage" in record.reason
        assert made.pins.overflowed()
        assert made.pins.counters()["overflow_nodes"] >= 1


def test_dead_images_make_room() -> None:
    """Far more images than the table holds, in chains that are longer than what one exit releases."""
    sizes = kernel.MapSizes(procs=8192, nodes=1000, graveyard=100, connects=1024)
    with bed("room", sizes) as made:
        chain = " ".join(["/usr/bin/env"] * 50)
        made.run(["/bin/sh", "-c", f"i=0; while [ $i -lt 60 ]; do {chain} /bin/true; i=$((i + 1)); done"])
        made.run(made.command("connect", tag="tag-after"))
        assert made.tags() == ["tag-after"]
        assert not made.pins.overflowed()
        assert made.pins.counters()["graveyard_cut"] > 0, "the table was never full: this test shows nothing"


def test_a_chain_without_end_is_cut_off_alone(shared: Bed) -> None:
    """An image may call execve as often as it likes: it loses its own label, and nobody else's."""
    prefix = ["/usr/bin/env"] * 1100
    shared.run([*prefix, *shared.command("connect", tag="tag-deep")])
    _accepted, record = shared.take()
    assert isinstance(record, kernel.Refused)
    assert shared.pins.counters()["too_deep"] == 1
    assert not shared.pins.overflowed()
    shared.run(shared.command("connect", tag="tag-next"))
    assert shared.tags() == ["tag-next"]


def test_records_that_nobody_takes_are_swept(shared: Bed) -> None:
    shared.run(shared.command("connect", tag="tag-swept"))
    accepted = shared.accept()
    assert shared.pins.sweep(60) == []
    swept = shared.pins.sweep(0)
    assert (accepted.dialled, True, True) in [(one.dest, one.local, one.established) for one in swept]
    assert isinstance(shared.pins.take(accepted.peer, accepted.dialled), kernel.Refused)
    assert accepted.dialled.port == PORT
