"""`hopgate kubeconfig`: what config management ships to those who use a Kubernetes target."""

from __future__ import annotations

import base64
from typing import Annotated

import typer

from hostagent.cli.options import DEFAULT_CONFIG, Config, settings

PLACEHOLDER = "the-gateway-holds-it"
"""Not a credential: kubectl asks for a user name where a kubeconfig has none at all. The gateway drops it."""


def kubeconfig(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Name of a Kubernetes target of the policy.")],
    server: Annotated[
        str, typer.Option("--server", metavar="URL", help="The API server's address; default: the target's first.")
    ] = "",
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace to start in.")] = "default",
    system_trust: Annotated[
        bool, typer.Option("--system-trust", help="Leave the CA out: clients trust what the host trusts.")
    ] = False,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Print a kubeconfig for a target: this host's CA and no credential, which the gateway holds."""
    import yaml

    from hostagent.errors import OperatorError
    from proxy.policy.document import PolicyError
    from proxy.policy.load import load

    chosen = settings(config)
    try:
        targets = {each.name: each for each in load(chosen.policy_dir).targets if each.protocol == "kubernetes"}
    except PolicyError as error:
        raise OperatorError(str(error)) from error
    found = targets.get(target)
    if found is None:
        known = ", ".join(f"`{name}`" for name in sorted(targets)) or "none"
        raise OperatorError(
            f"`{target}` is no Kubernetes target of the policy in `{chosen.policy_dir}`: known are {known}"
        )
    cluster: dict[str, object] = {"server": server or _url(found.hosts[0].host, found.hosts[0].port)}
    if found.hosts[0].network and not server:
        raise OperatorError(f"target `{target}` is a network: say which server with --server")
    if not system_trust and not found.serving:
        path = chosen.state_dir / "ca" / "ca.pem"
        try:
            authority = path.read_bytes()
        except OSError as error:
            raise OperatorError(
                f"cannot read the host's CA from `{path}`: {error.strerror}: it is made when hopgate first starts"
            ) from error
        cluster["certificate-authority-data"] = base64.b64encode(authority).decode()
    elif not system_trust and found.ca_pem:
        cluster["certificate-authority-data"] = base64.b64encode(found.ca_pem.encode()).decode()
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": target, "cluster": cluster}],
        "users": [{"name": "hopgate", "user": {"token": PLACEHOLDER}}],
        "contexts": [{"name": target, "context": {"cluster": target, "user": "hopgate", "namespace": namespace}}],
        "current-context": target,
    }
    print(yaml.safe_dump(document, sort_keys=False), end="")


def _url(host: str, port: int) -> str:
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
