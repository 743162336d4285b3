"""The files in `cluster/`: valid for the programs that read them, tokens on, dashboards on the loopback."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parent.parent / "cluster"
CLOUDS = ("aws", "gcp")
MANIFESTS = sorted(CLUSTER.glob("kuberay-*.yaml"))
KUBERNETES = "1.34"

# The fields of KubeRay that our manifests use, as its reference describes them (ray.io/v1); pods are validated apart.
POD = {"type": "object", "required": ["spec"]}
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
GROUP = {
    "type": "object",
    "required": ["groupName", "template"],
    "additionalProperties": False,
    "properties": {
        "groupName": {"type": "string"},
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "rayStartParams": PARAMETERS,
        "template": POD,
    },
}
RAY_CLUSTER = {
    "type": "object",
    "required": ["headGroupSpec"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "authOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"mode": {"enum": ["disabled", "token"]}},
        },
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"idleTimeoutSeconds": COUNT},
        },
        "headGroupSpec": {
            "type": "object",
            "required": ["template"],
            "additionalProperties": False,
            "properties": {"rayStartParams": PARAMETERS, "template": POD},
        },
        "workerGroupSpecs": {"type": "array", "items": GROUP},
    },
}
RAY_JOB = {
    "type": "object",
    "required": ["entrypoint", "rayClusterSpec"],
    "additionalProperties": False,
    "properties": {
        "entrypoint": {"type": "string"},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "backoffLimit": COUNT,
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": COUNT,
        "rayClusterSpec": RAY_CLUSTER,
    },
}
SCHEMAS = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def ray_cluster(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The specification of the cluster that a manifest makes, if it makes one."""
    spec: dict[str, Any] = manifest.get("spec", {})
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec")}.get(manifest["kind"])


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


CLUSTERS = [(path.name, cluster) for path in MANIFESTS if (cluster := ray_cluster(content(path))) is not None]
CLUSTER_NAMES = [name for name, _ in CLUSTERS]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_takes_a_cloud_s_file(cloud: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(CLUSTER.parent)
    validate_config(prepare_config(content(CLUSTER / f"{cloud}.yaml")))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_refuses_a_cloud_s_file_with_a_key_that_it_does_not_know(cloud: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(content(CLUSTER / f"{cloud}.yaml") | {"max_wrokers": 3}))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_cloud_s_nodes_start_with_tokens_and_a_dashboard_on_the_loopback(cloud: str) -> None:
    file = content(CLUSTER / f"{cloud}.yaml")
    head, worker = file["head_start_ray_commands"][-1], file["worker_start_ray_commands"][-1]
    kept = "RAY_AUTH_MODE=token ray start --head" in head and "--dashboard-host=127.0.0.1" in head
    assert (kept, "RAY_AUTH_MODE=token ray start" in worker) == (True, True)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_cloud_s_ray_is_the_pinned_one(cloud: str) -> None:
    pinned = re.search(r"^ray==(.*)$", (CLUSTER.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert f":{pinned[1]}-" in content(CLUSTER / f"{cloud}.yaml")["docker"]["image"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_is_what_its_kind_allows(path: Path) -> None:
    manifest = content(path)
    if manifest["kind"] in SCHEMAS:
        jsonschema.validate(manifest["spec"], SCHEMAS[manifest["kind"]])
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize(("name", "cluster"), CLUSTERS, ids=CLUSTER_NAMES)
def test_pods_are_what_kubernetes_allows(name: str, cluster: dict[str, Any]) -> None:
    for number, template in enumerate(pods(cluster)):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod-{number}"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize(("name", "cluster"), CLUSTERS, ids=CLUSTER_NAMES)
def test_pods_mount_only_volumes_that_they_have(name: str, cluster: dict[str, Any]) -> None:
    for template in pods(cluster):
        mounted = {mount["name"] for c in template["spec"]["containers"] for mount in c["volumeMounts"]}
        assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}


@pytest.mark.parametrize(("name", "cluster"), CLUSTERS, ids=CLUSTER_NAMES)
def test_a_cluster_on_kubernetes_asks_for_its_token(name: str, cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token"}


def test_a_pod_with_a_field_that_kubernetes_does_not_know_is_refused() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containres": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_clean(path: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for command in (["bash", "-n"], [str(shellcheck)]):
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_each_way_has_its_three_commands() -> None:
    blocks = re.findall(r"```\n(.*?)```", (CLUSTER / "README.md").read_text(), re.DOTALL)
    assert [len(block.splitlines()) for block in blocks] == [3] * len(blocks) != []


def test_every_file_has_its_place_in_the_readme() -> None:
    readme = (CLUSTER / "README.md").read_text()
    files = [path.name for path in CLUSTER.iterdir() if path.name != "README.md"]
    assert [name for name in files if f"cluster/{name}" not in readme] == []
