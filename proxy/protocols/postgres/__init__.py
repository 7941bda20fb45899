"""PostgreSQL, protocol 3.0: `machine` up to the login, `relay` after it, and what both stand on."""

from proxy.protocols.postgres.errand import visiting as visit
from proxy.protocols.postgres.machine import PostgresMachine as Machine
from proxy.protocols.postgres.operations import PROTOCOL

DEFAULT_PORTS = (5432,)

__all__ = ["DEFAULT_PORTS", "PROTOCOL", "Machine", "visit"]
