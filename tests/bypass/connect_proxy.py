"""An HTTP proxy that knows nothing but CONNECT: `python connect_proxy.py PORT`. Says `ready` when it listens."""

import socket
import sys
import threading


def copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        sink.close()


def serve(client: socket.socket) -> None:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    host, _, port = head.split()[1].decode().rpartition(":")
    with client, socket.create_connection((host, int(port))) as server:
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        other = threading.Thread(target=copy, args=(client, server), daemon=True)
        other.start()
        copy(server, client)


with socket.create_server(("", int(sys.argv[1]))) as listener:
    print("ready", flush=True)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
