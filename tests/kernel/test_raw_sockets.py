"""Who writes below TCP is told: the kernel by the sender's own image, /proc by who has the socket open."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent import kernel
from hostagent.kernel import abi, raw_sockets
from proxy.model import Endpoint
from tests.kernel.bed import BEYOND, PORT, Bed

SENT = abi.EVENTS["EVENT_SENT_RAW"]
_FRAME = """
import socket, struct, sys
def frame(address, port, proto=6):
    if ":" in address:
        ip = struct.pack("!IHBB", 6 << 28, 20, proto, 64) + socket.inet_pton(10, "2001:db8::1")
        ip += socket.inet_pton(10, address)
    else:
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, proto, 0) + socket.inet_aton("192.0.2.1")
        ip += socket.inet_aton(address)
    return ip + struct.pack("!HHIIBBHHH", 7000, port, 1, 0, 0x50, 2, 1000, 0, 0)
def send(address, port, raw, times=1):
    kind = 0x86DD if ":" in address else 0x0800
    sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW if raw else socket.SOCK_DGRAM, 0)
    ethernet = bytes(12) + struct.pack("!H", kind) if raw else b""
    for _ in range(times):
        sender.sendto(ethernet + frame(address, port), ("wire", kind, 0, 1, b"\\xff" * 6))
"""


@pytest.fixture
def events(shared: Bed) -> Iterator[kernel.Events]:
    opened = kernel.Events.open(shared.settings.pin_dir)
    opened.read(10_000)
    time.sleep(1.1)  # what an earlier test was told is over
    yield opened
    opened.close()


def _run(made: Bed, body: str, **options: object) -> None:
    made.run([sys.executable, "-I", "-S", "-c", _FRAME + body], **options)


def _sent(events: kernel.Events, tgid: int | None = None) -> list[kernel.Event]:
    return [one for one in events.read(10_000) if one.type == SENT and tgid in (None, one.tgid)]


@pytest.mark.parametrize("raw", [False, True], ids=["dgram", "raw"])
@pytest.mark.parametrize("address", BEYOND)
def test_a_frame_to_what_is_protected_is_told_once_with_its_image(
    shared: Bed, events: kernel.Events, address: str, raw: bool
) -> None:
    _run(shared, f"send({address!r}, {PORT}, {raw}, times=50); send({address!r}, 6000, {raw}, times=50)")
    there, elsewhere = sorted(_sent(events), key=lambda event: -event.detail)
    assert (there.detail, elsewhere.detail) == (abi.SENT_FRAME_IN_SCOPE, abi.SENT_FRAME)
    assert (there.dest, elsewhere.dest) == (Endpoint(address, PORT), Endpoint(address, 6000))
    assert there.source is not None and there.source.port == 7000
    lineage = shared.pins.lineage(there.node)
    assert lineage is not None and lineage[-1].tgid == there.tgid
    assert lineage[-1].argv[1:4] == ("-I", "-S", "-c")


def test_frames_in_other_namespaces_and_outside_the_cgroup_are_told(shared: Bed, events: kernel.Events) -> None:
    _run(shared, f"send('192.0.2.1', {PORT}, True)", netns=shared.beyond)
    _run(shared, f"send('192.0.2.1', {PORT}, True)", cgroup=None)
    assert [event.detail for event in _sent(events)] == [abi.SENT_FRAME_IN_SCOPE] * 2


def test_what_is_no_ip_goes_to_nowhere(shared: Bed, events: kernel.Events) -> None:
    _run(
        shared,
        "s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)\n"
        "for tail in (b'', b'\\x45', b'\\x81\\x00\\x00\\x01\\x08\\x00' + frame('192.0.2.2', 5432)):\n"
        "    s.sendto(bytes(12) + b'\\x88\\xb5' + tail, ('wire', 0x88b5))",
    )
    # others on this machine may send frames too
    sent = _sent(events)
    ours = {event.tgid for event in sent if event.dest is None}
    assert {(event.detail, event.dest) for event in sent if event.tgid in ours} == {(abi.SENT_FRAME, None)}


@pytest.mark.parametrize(
    ("family", "protocol", "told"),
    [("INET", 6, True), ("INET", 255, True), ("INET6", 6, True), ("INET", 1, False), ("INET6", 58, False)],
)
def test_a_raw_ip_socket_is_told_unless_it_is_for_icmp(
    shared: Bed, events: kernel.Events, family: str, protocol: int, told: bool
) -> None:
    _run(shared, f"[socket.socket(socket.AF_{family}, socket.SOCK_RAW, {protocol}) for _ in range(9)]")
    assert [event.detail for event in _sent(events)] == [abi.SENT_RAW_IP] * told


_FLOOD = """
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	if (argc > 1)
		return socket(AF_INET, SOCK_RAW, 6) < 0;
	for (int made = 0; made < 2000; made++) {
		if (!vfork())
			execl(argv[0], argv[0], "-", (char *)0);
		wait(0);
	}
	return 0;
}
"""


def test_a_flood_of_images_is_bounded(shared: Bed, events: kernel.Events, tmp_path: Path) -> None:
    flood = tmp_path / "flood"
    subprocess.run(["gcc", "-O1", "-static", "-x", "c", "-o", flood, "-"], input=_FLOOD, text=True, check=True)
    untold = shared.pins.counters()["raw_untold"]
    begun = time.monotonic()
    shared.run([str(flood)])
    seconds = time.monotonic() - begun
    told = len(_sent(events))
    assert 64 <= told <= 64 * (seconds + 2)
    assert shared.pins.counters()["raw_untold"] - untold + told == 2000


@pytest.mark.parametrize("netns", ["netns", "beyond"])
def test_open_sockets_are_found_with_their_owner(shared: Bed, netns: str) -> None:
    before = raw_sockets.stamp()
    body = "a = socket.socket(17, 3, 0); b = socket.socket(44, 3, 0); print(1, flush=True); sys.stdin.read()"
    with shared.start([sys.executable, "-I", "-S", "-c", _FRAME + body], netns=getattr(shared, netns)) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert len(raw_sockets.stamp() - before) == 2
        mine = {one.kind for one in raw_sockets.owners() if one.tgid == process.pid}
        assert mine == {"AF_PACKET", "AF_XDP"}
        process.communicate(timeout=10)
    assert raw_sockets.stamp() == before
