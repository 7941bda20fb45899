"""Does with Python's client libraries what programs do with a cluster, and prints what they see. Run with `python -I`:

    pyclient.py kubernetes|kr8s|lightkube KUBECONFIG list configmaps|secrets|pods
    pyclient.py kubernetes|kr8s|lightkube KUBECONFIG watch COUNT     # ConfigMaps, until COUNT events were told
    pyclient.py kubernetes|kr8s KUBECONFIG exec POD COMMAND...       # over WebSocket

Everything is in the namespace `default`. What the server refuses ends it with status 1 and the server's words.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

KINDS = {"configmaps": "ConfigMap", "secrets": "Secret", "pods": "Pod"}


def tell(kind: str, name: str, data: Mapping[str, str] | None) -> None:
    print(kind.lower(), name, *(f"{key}={value}" for key, value in sorted((data or {}).items())), flush=True)


def with_kubernetes(kubeconfig: str, action: str, words: list[str]) -> None:
    from kubernetes import client, config, stream, watch

    with config.new_client_from_config(kubeconfig) as api:
        core = client.CoreV1Api(api)
        if action == "list":
            kind = KINDS[words[0]]
            calls = {
                "ConfigMap": core.list_namespaced_config_map,
                "Secret": core.list_namespaced_secret,
                "Pod": core.list_namespaced_pod,
            }
            for one in calls[kind]("default").items:
                tell(kind, one.metadata.name, getattr(one, "data", None))
        elif action == "watch":
            events = watch.Watch().stream(core.list_namespaced_config_map, "default", timeout_seconds=60)
            for _, event in zip(range(int(words[0])), events, strict=False):
                print(event["type"], event["object"].metadata.name, flush=True)
        else:
            call = core.connect_get_namespaced_pod_exec
            running = stream.stream(
                call, words[0], "default", command=words[1:], stdout=True, stderr=True, _preload_content=False
            )
            running.run_forever(timeout=60)
            print(running.read_stdout(), end="")
            print(running.read_stderr(), end="", file=sys.stderr)
            sys.exit(running.returncode)


def with_kr8s(kubeconfig: str, action: str, words: list[str]) -> None:
    import kr8s
    from kr8s.objects import Pod

    api = kr8s.api(kubeconfig=kubeconfig)
    if action == "list":
        for one in api.get(words[0], namespace="default"):
            tell(one.kind, one.name, one.raw.get("data"))
    elif action == "watch":
        for _, (what, one) in zip(range(int(words[0])), api.watch("configmaps", namespace="default"), strict=False):
            print(what, one.name, flush=True)
    else:
        done = Pod.get(words[0], namespace="default", api=api).exec(words[1:], check=False)
        print(done.stdout.decode(), end="")
        print(done.stderr.decode(), end="", file=sys.stderr)
        sys.exit(done.returncode)


def with_lightkube(kubeconfig: str, action: str, words: list[str]) -> None:
    import lightkube
    from lightkube.resources import core_v1

    client = lightkube.Client(lightkube.KubeConfig.from_file(kubeconfig))
    if action == "list":
        kind = KINDS[words[0]]
        for one in client.list(getattr(core_v1, kind), namespace="default"):
            tell(kind, one.metadata.name, getattr(one, "data", None))
    elif action == "watch":
        events: Iterator[tuple[str, core_v1.ConfigMap]] = client.watch(core_v1.ConfigMap, namespace="default")
        for _, (what, one) in zip(range(int(words[0])), events, strict=False):
            print(what, one.metadata.name, flush=True)
    else:
        sys.exit("lightkube cannot execute")


if __name__ == "__main__":
    library, kubeconfig, action, *words = sys.argv[1:]
    try:
        {"kubernetes": with_kubernetes, "kr8s": with_kr8s, "lightkube": with_lightkube}[library](
            kubeconfig, action, words
        )
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
