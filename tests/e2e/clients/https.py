"""Speaks to a TLS server by hand, and says what came back: a hostile, or an old, client.

    https.py ADDRESS PORT CA < CONVERSATIONS

CONVERSATIONS is a JSON list; each gets a connection of its own and is a list of steps:

    {"send": BASE64}         a reset while sending ends the conversation
    {"wait": SECONDS}
    {"until": BASE64}        reads until these bytes were received (on top of what came before)
    {"drain": SECONDS}       reads until the server ends the connection, at most so long

For each it prints `{"received": BASE64, "end": "eof" | "reset" | "open", "took_s": SECONDS}`, all in one JSON list.
"""

from __future__ import annotations

import base64
import json
import socket
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor

STEP_TIMEOUT_S = 20.0
AT_A_TIME = 16


def converse(
    address: str, port: int, context: ssl.SSLContext, steps: list[dict[str, str | float]]
) -> dict[str, object]:
    received = bytearray()
    end = "open"
    begun = time.monotonic()
    try:
        with (
            socket.create_connection((address, port), STEP_TIMEOUT_S) as raw,
            context.wrap_socket(raw, server_hostname=address, suppress_ragged_eofs=True) as connection,
        ):

            def read(limit_s: float, wanted: bytes | None) -> str:
                deadline = time.monotonic() + limit_s
                while wanted is None or wanted not in received:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return "open"
                    connection.settimeout(left)
                    try:
                        data = connection.recv(65536)
                    except TimeoutError:
                        return "open"
                    if not data:
                        return "eof"
                    received.extend(data)
                return "open"

            for step in steps:
                connection.settimeout(STEP_TIMEOUT_S)
                if "send" in step:
                    connection.sendall(base64.b64decode(str(step["send"])))
                elif "wait" in step:
                    time.sleep(float(step["wait"]))
                elif "until" in step:
                    end = read(STEP_TIMEOUT_S, base64.b64decode(str(step["until"])))
                else:
                    end = read(float(step["drain"]), None)
                if end != "open":
                    break
    except (ssl.SSLError, OSError) as error:
        end = f"reset: {error}" if not isinstance(error, ConnectionError) else "reset"
    return {
        "received": base64.b64encode(received).decode(),
        "end": end,
        "took_s": time.monotonic() - begun,
    }


if __name__ == "__main__":
    context = ssl.create_default_context(cafile=sys.argv[3])
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        told = pool.map(lambda one: converse(sys.argv[1], int(sys.argv[2]), context, one), json.load(sys.stdin))
        print(json.dumps([*told]))
