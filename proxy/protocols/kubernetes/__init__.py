"""Kubernetes API servers: `machine` is the session, over `http`; `requests` tells what is asked, `masks` what may be
shown, `streams` what goes through exec, attach and port-forward, `preview` what would come of what is held."""

from proxy.protocols.kubernetes.errand import Visit as visit
from proxy.protocols.kubernetes.machine import KubernetesMachine as Machine
from proxy.protocols.kubernetes.requests import PROTOCOL

DEFAULT_PORTS = (6443,)

__all__ = ["DEFAULT_PORTS", "PROTOCOL", "Machine", "visit"]
