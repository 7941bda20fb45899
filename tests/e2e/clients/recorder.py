"""Runs a command whose PGHOST and PGPORT are a relay of this process, and keeps every byte that it was sent.

recorder.py FILE COMMAND…
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading


def pump(source: socket.socket, sink: socket.socket, keep: int) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if keep >= 0:
                os.write(keep, data)
            sink.sendall(data)
    for end, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            end.shutdown(how)


def serve(listener: socket.socket, address: str, keep: int) -> None:
    while True:
        client, _ = listener.accept()
        server = socket.create_connection((address, 5432))
        threading.Thread(target=pump, args=(client, server, -1), daemon=True).start()
        threading.Thread(target=pump, args=(server, client, keep), daemon=True).start()


keep = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=serve, args=(listener, os.environ["PGHOST"], keep), daemon=True).start()
told = {**os.environ, "PGHOST": "127.0.0.1", "PGPORT": str(listener.getsockname()[1])}
sys.exit(subprocess.run(sys.argv[2:], env=told).returncode)
