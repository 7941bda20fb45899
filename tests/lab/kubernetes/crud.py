"""Creates, reads, changes and deletes with Python's `kubernetes` and `$KUBECONFIG`, and prints what it is told."""

from __future__ import annotations

from kubernetes import client, config

core = client.CoreV1Api(config.new_client_from_config())
body = client.V1ConfigMap(metadata=client.V1ObjectMeta(name="conformance"), data={"a": "b"})
print(core.create_namespaced_config_map("default", body).data)
for call in (
    lambda: core.create_namespaced_config_map("default", body),
    lambda: core.patch_namespaced_config_map("conformance", "default", {"data": {"c": "d"}}).data,
    lambda: core.replace_namespaced_config_map("conformance", "default", body).data,
    lambda: core.read_namespaced_config_map("conformance", "default").metadata.name,
    lambda: [each.metadata.name for each in core.list_config_map_for_all_namespaces(label_selector="a=b").items],
    lambda: core.list_namespaced_pod("default", limit=1).items[0].status.phase,
    lambda: core.read_namespaced_pod_log("shell", "default", tail_lines=1),
    lambda: core.delete_namespaced_config_map("conformance", "default").status,
    lambda: core.read_namespaced_config_map("conformance", "default"),
    lambda: client.VersionApi(core.api_client).get_code().major,
):
    try:
        print(call())
    except client.ApiException as error:
        print(error.status, error.reason, error.body)
