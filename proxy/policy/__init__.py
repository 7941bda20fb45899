"""The policy: read from files, checked, resolved, compiled, and asked. Everything but `load` is pure.

document = load(Path("/etc/hopgate/policy"))
resolved = resolve(document, resolver)
judge = CompiledPolicy(resolved, mask_key).bind(chain.principals, target, database)
ruling = judge.decide(operation)
"""

from proxy.policy.compile import CompiledPolicy
from proxy.policy.decide import Judge
from proxy.policy.document import Agent, Document, PolicyError, ResolvedPolicy, Rule, resolve
from proxy.policy.load import load, load_files

__all__ = [
    "Agent",
    "CompiledPolicy",
    "Document",
    "Judge",
    "PolicyError",
    "ResolvedPolicy",
    "Rule",
    "load",
    "load_files",
    "resolve",
]
