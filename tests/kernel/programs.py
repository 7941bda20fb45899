"""Programs that the tests start as clients. Each connects to ADDRESS PORT and sends a line with its own process id.

Run as `python -I -S programs.py NAME ARGUMENTS`. What a test looks for in the lineage is a word in the arguments
(`tag-…`).
"""

import contextlib
import ctypes
import os
import random
import socket
import struct
import sys
import threading
import time

BASH = "/bin/bash"
# $$ is the id of the shell that connects; the word at the end is there to be seen in the lineage
_SHELL = 'exec 3<>"/dev/tcp/$1/$2" && echo "$$ $0" >&3'


def shell(address, port, tag):
    return [BASH, "-c", _SHELL, tag, address, port]


def say(address, port, tag, source=None):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as client:
        if source is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(("", source))
        client.connect((address, int(port)))
        client.sendall(f"{os.getpid()} {tag}\n".encode())


def connect(address, port, tag):
    say(address, port, tag)


def storm(address, port, tag, number, executed):
    """Forks `number` processes that connect and exit at once, and starts `executed` shells that do."""
    number, executed = int(number), int(executed)
    every = number // executed if executed else number + 1
    for index in range(number):
        if index % every == 0 and index // every < executed:
            path, argv = BASH, shell(address, port, f"{tag}-{index}")
            os.waitpid(os.posix_spawn(path, argv, os.environ), 0)
        child = os.fork()
        if child == 0:
            try:
                say(address, port, tag)
            finally:
                os._exit(0)
        os.waitpid(child, 0)


def orphan(address, port, tag):
    """Starts a shell that connects when its parent and grandparent are dead and it is the leader of a session."""
    if os.fork():
        os._exit(0)
    os.setsid()
    parent = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == parent:
        time.sleep(0.001)
    os.execv(BASH, shell(address, port, tag + "-leaf"))


def thread(address, port, tag):
    started = threading.Thread(target=say, args=(address, port, tag))
    started.start()
    started.join()


def thread_exec(address, port, tag):
    """Calls execve in a thread that is not the leader."""
    threading.Thread(target=os.execv, args=(BASH, shell(address, port, tag + "-after"))).start()
    time.sleep(30)


def spawn(address, port, tag):
    """posix_spawn: glibc uses CLONE_VM and CLONE_VFORK."""
    os.waitpid(os.posix_spawn(BASH, shell(address, port, tag + "-spawned"), os.environ), 0)


def on_line(address, port, tag):
    """Connects for each line on standard input: `fork`, `exec` or `self`."""
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "self":
            say(address, port, tag)
        elif line.strip() == "fork":
            child = os.fork()
            if child == 0:
                say(address, port, tag)
                os._exit(0)
            os.waitpid(child, 0)
        else:
            os.waitpid(os.posix_spawn(BASH, shell(address, port, tag + "-later"), os.environ), 0)


def child_on_line(address, port, tag):
    """The same, as the child of a process of its own image."""
    here = [sys.executable, "-I", "-S", __file__, "on_line", address, port, tag + "-child"]
    os.waitpid(os.posix_spawn(sys.executable, here, os.environ), 0)


def from_port(address, port, tag, source):
    say(address, port, tag, int(source))


def marked(address, port, tag, mark):
    """Sets SO_MARK before it connects."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, int(mark))
        client.connect((address, int(port)))
        print(client.getsockopt(socket.SOL_SOCKET, socket.SO_MARK), flush=True)
        client.sendall(f"{os.getpid()} {tag}\n".encode())


def muster(address, port, tag, muster_address, muster_port):
    """Connects to the muster, waits for a line, connects to the address and says what the server sent first."""
    with socket.create_connection((muster_address, int(muster_port))) as kept:
        print(kept.getsockname()[1], flush=True)
        sys.stdin.readline()
        with socket.create_connection((address, int(port)), timeout=5) as client:
            print(client.recv(100).decode(), flush=True)


def pending(address, port, tag, source):
    """Connects without waiting for the outcome, and keeps the socket until standard input ends."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        client.bind(("", int(source)))
        client.connect_ex((address, int(port)))
        print("connecting", flush=True)
        sys.stdin.read()


def datagram(address, port, tag):
    """Sends a datagram and says what became of it."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        try:
            client.connect((address, int(port)))
            client.send(b"x")
            client.recv(1)
        except OSError as error:
            print(type(error).__name__, flush=True)


def reset(address, port, tag):
    """Connects and resets at once."""
    with socket.create_connection((address, int(port))) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def talk(address, port, tag, *steps):
    """Connects and does one step after another, `VERB[:HEX]`; says in hex what came from the server, and how it ended.

    `send`, `bytes` (one in each segment), `fast` (in the SYN), `close` (no more to send), `recv` (what there is),
    `filter` (takes what memory the socket may have), `options4` and `options6` (headers before that of TCP), `line`
    (waits for one on standard input).
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(3)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected = False
        for step in steps:
            verb, _, words = step.partition(":")
            data = bytes.fromhex(words)
            try:
                if verb == "filter":
                    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFF) * 4096)
                    for length in range(4096, 0, -1):
                        program = struct.pack("HL", length, ctypes.addressof(code))
                        with contextlib.suppress(OSError):
                            client.setsockopt(socket.SOL_SOCKET, 26, program)
                            break
                elif verb == "options4":
                    client.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x01" * 8)
                elif verb == "options6":
                    client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))
                elif verb == "fast":
                    client.sendto(data, socket.MSG_FASTOPEN, (address, int(port)))
                    connected = True
                else:
                    if not connected:
                        client.connect((address, int(port)))
                        connected = True
                    if verb == "send":
                        client.sendall(data)
                    elif verb == "bytes":
                        for byte in data:
                            client.sendall(bytes([byte]))
                            time.sleep(0.002)
                    elif verb == "close":
                        client.shutdown(socket.SHUT_WR)
                    elif verb == "recv":
                        print(client.recv(1 << 16).hex(), flush=True)
                    elif verb == "line":
                        print("ready", flush=True)
                        sys.stdin.readline()
            except OSError as error:
                print(type(error).__name__, flush=True)
                return
        if connected:
            # struct tcp_info: the fast open's data was acknowledged
            print(f"options {client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[5]:#x}", flush=True)


def noise(address, port, tag, number, seed):
    """Sends `number` random beginnings, each by a connection of its own, and says how many came back as they were."""
    chosen = random.Random(int(seed))
    same = 0
    for _ in range(int(number)):
        data = chosen.randbytes(chosen.choice([1, 2, 7, 8, 9, 15, 16, 17, 100, 3000]))
        with socket.create_connection((address, int(port)), timeout=5) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            came = b""
            while more := client.recv(1 << 16):
                came += more
            same += came == data
    print(same, flush=True)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
