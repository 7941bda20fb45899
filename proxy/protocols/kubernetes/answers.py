"""What the gateway itself says to a client of an API server: `metav1.Status` objects, which every client can read and
kubectl prints as `Error from server (Forbidden): …` (Kubernetes API conventions, "Response Status Kind")."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Final

import msgspec

from proxy.model import RequestFacts, Ruling

JSON: Final = b"application/json"
TEXT: Final = b"text/plain; charset=utf-8"
MAX_WARNING: Final = 1000
"""Characters of a warning's text."""
MAX_MESSAGE: Final = 500
"""Characters of a server's message that are recorded."""
APPROVAL: Final = "[approval"
"""How the rule begins that stands for a human's word in a ruling's reasons."""

_REASONS: Final = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    408: "Timeout",
    413: "RequestEntityTooLarge",
    500: "InternalError",
    502: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}
"""metav1.StatusReason by code; what has no reason of its own is a bad request."""
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]+")


def status(code: int, message: str, facts: RequestFacts | None = None) -> bytes:
    """The encoded `Status` of a failure. `facts` say what it is about."""
    body: dict[str, object] = {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": _REASONS.get(code, "BadRequest"),
    }
    if facts is not None and facts.resource:
        named = {"name": facts.name, "group": facts.group, "kind": facts.resource}
        body["details"] = {key: value for key, value in named.items() if value}
    return msgspec.json.encode({**body, "code": code})


def failure(code: int, message: str, facts: RequestFacts | None = None) -> tuple[int, bytes, bytes]:
    """Status, media type and body of a failure. Where the path is no resource's it is plain text: what fails in
    discovery is read by client-go, which takes no `Status` apart there (kubectl would print `unknown`) and keeps its
    readers from whatever a 503 says."""
    if facts is None or facts.resource:
        return code, JSON, status(code, message, facts)
    return 502 if code == 503 else code, TEXT, message.encode() + b"\n"


def phrase(code: int) -> str:
    """`Forbidden` for 403."""
    try:
        return HTTPStatus(code).phrase
    except ValueError:
        return ""


def sentence(message: str, hint: str) -> str:
    """One human sentence: what is the matter, and what to do next."""
    return f"{message}; {hint}" if hint else message


def warning(ruling: Ruling) -> bytes:
    """The `Warning` header that says who approved what is answered, as clients print it (RFC 7234, 5.5); empty where
    nobody was asked."""
    last = ruling.reasons[-1] if ruling.reasons else None
    if last is None or not last.rule.startswith(APPROVAL):
        return b""
    text = _UNPRINTABLE.sub(" ", last.text)[:MAX_WARNING].replace("\\", "\\\\").replace('"', '\\"')
    return f'299 hopgate "{text}"'.encode()


def told(status_body: bytes) -> str:
    """The message of a `Status` that a server answered with, for the recording; empty where there is none."""
    try:
        message = msgspec.json.decode(status_body, type=_Told).message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    return message[:MAX_MESSAGE]


class _Told(msgspec.Struct):
    message: str = ""
