"""The evidence: an append-only, hash-chained file a session; its writer, its reader, its replay."""

from proxy.recording.reader import BrokenRecording, Entry, State, Verdict, read, verify
from proxy.recording.records import AuditUnavailable
from proxy.recording.writer import RulingPieces, Writer

__all__ = [
    "AuditUnavailable",
    "BrokenRecording",
    "Entry",
    "RulingPieces",
    "State",
    "Verdict",
    "Writer",
    "read",
    "verify",
]
