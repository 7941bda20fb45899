"""A client without a socket: `python raw.py SOURCE SOURCE_PORT DEST DEST_PORT` completes a TCP handshake by hand.

A process of its own, because scapy looks at the interfaces of the namespace in which it is imported. The kernel of the
namespace has to be kept from answering with resets. Ends with status 1 when nobody answers.
"""

from __future__ import annotations

import sys

from scapy.layers.inet import IP, TCP
from scapy.packet import Packet
from scapy.sendrecv import send, sr1


def main(source: str, source_port: str, dest: str, dest_port: str) -> int:
    def segment(**fields: object) -> Packet:
        return IP(src=source, dst=dest) / TCP(sport=int(source_port), dport=int(dest_port), **fields)

    answer = sr1(segment(flags="S", seq=7000), timeout=5, verbose=False)
    if answer is None or not answer.haslayer(TCP) or answer[TCP].flags != "SA":
        print(f"no SYN-ACK but {answer!r}", file=sys.stderr)
        return 1
    send(segment(flags="A", seq=7001, ack=answer[TCP].seq + 1), verbose=False)
    send(segment(flags="PA", seq=7001, ack=answer[TCP].seq + 1) / b"0 raw\n", verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
