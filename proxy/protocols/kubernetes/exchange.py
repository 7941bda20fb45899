"""One request and its answer, on the way through the machine.

stage      what is awaited
BODY       the rest of a body that is judged
RULING     the answer to AskRuling; while a human decides, `preview` may ask the server for a dry run
CREDENTIAL the answer to AskCredential; then the request is sent, with the gateway's token and none of the client's
REACHING   the server once more, which left while a human decided
ANSWER     the answer's head; a body that is not judged goes on meanwhile
RELAY      the rest of the answer's body, through the masks
"""

from __future__ import annotations

import enum

from proxy.model import RequestFacts, Ruling
from proxy.protocols.kubernetes import http
from proxy.protocols.kubernetes.http import Answer, Framing
from proxy.protocols.kubernetes.masks import Plan, Transformer
from proxy.protocols.kubernetes.preview import Inquiry
from proxy.protocols.kubernetes.requests import Body, Described, Head, Request


class Stage(enum.Enum):
    BODY = "body"
    RULING = "ruling"
    CREDENTIAL = "credential"
    REACHING = "reaching"
    ANSWER = "answer"
    RELAY = "relay"


class Exchange:
    """One request and its answer. What a stage has done with is let go, since a watch lasts for hours."""

    __slots__ = (
        "answer",
        "approved",
        "begun",
        "body",
        "chunked",
        "closes",
        "described",
        "facts",
        "framing",
        "head",
        "heard",
        "id",
        "inquiry",
        "method",
        "plan",
        "record_input",
        "refused",
        "request",
        "ruling",
        "stage",
        "streamed",
        "token",
        "transformer",
        "unsent",
    )

    def __init__(self, id: int, head: Head, request: Request, framing: Framing) -> None:
        self.id = id
        self.method = head.method
        self.head: Head | None = head
        self.request: Request | None = request
        self.framing = framing
        self.closes = http.closes(head)
        """Whether the connection ends with the answer."""
        self.begun = False
        """Whether the answer's head is on its way to the client."""
        self.facts: RequestFacts = request.facts
        self.stage = Stage.BODY
        self.body: bytearray | None = bytearray() if request.body is Body.JUDGED else None
        self.streamed = request.body is Body.STREAMED
        self.described: Described | None = None
        self.refused = 0
        """The status of a request that is refused whatever the ruling on it says."""
        self.ruling: Ruling | None = None
        self.token = ""
        """What is sent once the server is there again."""
        self.record_input = False
        """Whether what is typed goes on record too."""
        self.inquiry: Inquiry | None = None
        self.approved = b""
        """The warning that says who approved it."""
        self.plan: Plan | None = None
        self.answer: Answer | None = None
        self.chunked = False
        """Whether the client gets the answer's body in chunks."""
        self.transformer: Transformer | None = None
        self.unsent = False
        """Whether the answer's head waits until the masks let the first bytes through."""
        self.heard: bytearray | None = None
        """What is kept of the answer: an answer to a question of our own, or a failure's message."""
