"""Asks a running daemon over its control socket; blocking, for the command line."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TypeVar

import msgspec

from hostagent.control import messages
from hostagent.errors import OperatorError

ANSWER_TIMEOUT_S = 30.0

_Wanted = TypeVar("_Wanted", bound=messages.Answer)


class ControlFailed(OperatorError):
    """The daemon said no, or nobody answered."""


def ask(path: Path, request: messages.Request, wanted: type[_Wanted], timeout_s: float = ANSWER_TIMEOUT_S) -> _Wanted:
    """Sends the request and gives the answer. Raises `ControlFailed`."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_s)
            sock.connect(str(path))
            sock.sendall(msgspec.json.encode(request) + b"\n")
            data = _receive(sock)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ControlFailed(f"hopgate is not running: nobody answers on `{path}`") from error
    except PermissionError as error:
        raise ControlFailed(f"only root may control hopgate: `{path}`") from error
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ControlFailed(_unanswered(path)) from error
    except TimeoutError as error:
        raise ControlFailed(f"hopgate did not answer on `{path}` within `{timeout_s:g}` s") from error
    except OSError as error:
        raise ControlFailed(f"control socket `{path}` failed: {error.strerror or error}") from error
    if not data.endswith(b"\n"):
        raise ControlFailed(_unanswered(path))
    try:
        answer = msgspec.json.decode(data, type=messages.Answer)
    except msgspec.MsgspecError as error:
        raise ControlFailed(f"hopgate's answer cannot be read: {error}; is it of the same version?") from error
    if isinstance(answer, messages.Failed):
        raise ControlFailed(answer.message)
    if not isinstance(answer, wanted):
        raise ControlFailed(f"hopgate answered `{type(answer).__name__}` to `{type(request).__name__}`")
    return answer


def answers(path: Path) -> bool:
    """True when a daemon listens on the path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_TIMEOUT_S)
        return sock.connect_ex(str(path)) == 0


def _unanswered(path: Path) -> str:
    return f"hopgate closed the control socket `{path}` without an answer: see its log"


def _receive(sock: socket.socket) -> bytes:
    data = bytearray()
    while not data.endswith(b"\n") and len(data) <= messages.MAX_ANSWER:
        more = sock.recv(65536)
        if not more:
            break
        data += more
    return bytes(data)
