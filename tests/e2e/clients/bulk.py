"""Moves much through one request, and says what came: `down` is a GET, `up` a POST of so many bytes.

    bulk.py ADDRESS PORT CA down PATH [PAUSE_S]
    bulk.py ADDRESS PORT CA up PATH SIZE

With PAUSE_S nothing is read for so long after the first `BLOCK`. It prints `{"status": N, "headers": {…}, "size": N,
"sha256": HEX}` of the answer; what is sent is `blocks(SIZE)`.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import ssl
import sys
import time
from collections.abc import Iterator

BLOCK = 1 << 20
TIMEOUT_S = 60.0


def blocks(size: int) -> Iterator[bytes]:
    """So many bytes, no block of which is like another."""
    rest = random.Random(7).randbytes(BLOCK - 8)
    for number in range(0, size, BLOCK):
        yield (number.to_bytes(8, "big") + rest)[: size - number]


if __name__ == "__main__":
    address, port, ca, way, path, *more = sys.argv[1:]
    connection = http.client.HTTPSConnection(
        address, int(port), timeout=TIMEOUT_S, context=ssl.create_default_context(cafile=ca)
    )
    if way == "up":
        length = int(more[0])
        connection.request("POST", path, blocks(length), {"Content-Length": str(length)})
    else:
        connection.request("GET", path)
    answer = connection.getresponse()
    digest, size = hashlib.sha256(), 0
    while data := answer.read(BLOCK):
        digest.update(data)
        if size == 0 and way == "down" and more:
            time.sleep(float(more[0]))
        size += len(data)
    told = {"status": answer.status, "headers": {k.lower(): v for k, v in answer.getheaders()}}
    print(json.dumps({**told, "size": size, "sha256": digest.hexdigest()}))
