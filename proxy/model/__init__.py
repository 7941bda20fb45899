"""Frozen values that every other part of the proxy speaks in. No behaviour beyond what a value can say of itself."""

from proxy.model.lineage import UNATTRIBUTED, Chain, Hop, Namespaces, ProcessImage
from proxy.model.masks import ColumnMask, FieldMask, Masker
from proxy.model.operation import Operation, OperationKind, Phase, Relation, RequestFacts, StatementFacts
from proxy.model.ruling import Decision, Reason, Ruling
from proxy.model.target import Endpoint, Prefix, Target, TlsMode

__all__ = [
    "UNATTRIBUTED",
    "Chain",
    "ColumnMask",
    "Decision",
    "Endpoint",
    "FieldMask",
    "Hop",
    "Masker",
    "Namespaces",
    "Operation",
    "OperationKind",
    "Phase",
    "Prefix",
    "ProcessImage",
    "Reason",
    "Relation",
    "RequestFacts",
    "Ruling",
    "StatementFacts",
    "Target",
    "TlsMode",
]
