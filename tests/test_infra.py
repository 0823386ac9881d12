"""Deployment files are checked by what will read them, as far as that is possible without an engine or a cluster."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]
INFRA = ROOT / "infra"
PREFECT = yaml.safe_load((INFRA / "prefect/prefect.yaml").read_text())
DEPLOYMENTS = {entry["name"]: entry for entry in PREFECT["deployments"]}
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())


def program(name: str) -> str:
    """A checker of the development set; it is skipped where its package has no build for the machine."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def find_problems(*command: str | Path) -> str:
    """What a checker complains of, nothing if all is well."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def find_pods(node: Any) -> list[dict[str, Any]]:
    """Every pod specification in a manifest."""
    if isinstance(node, list):
        return [pod for entry in node for pod in find_pods(entry)]
    if not isinstance(node, dict):
        return []
    return [node] * ("containers" in node) + [pod for entry in node.values() for pod in find_pods(entry)]


def find_claims(manifest: dict[str, Any]) -> set[str]:
    """Volumes that a manifest makes for its pods."""
    specs = [entry.get("spec", {}) for entry in manifest.get("items", ())]
    return {claim["metadata"]["name"] for spec in specs for claim in spec.get("volumeClaimTemplates", ())}


# --- Prefect ----------------------------------------------------------------------------------------------------------


def test_prefect_reads_its_deployments() -> None:
    model = PrefectYamlModel.model_validate(PREFECT)
    assert [entry.name for entry in model.deployments] == list(DEPLOYMENTS)
    assert {"nightly-pruning", "weekly-sweep", "watch-dense"} <= set(DEPLOYMENTS)
    for entry in model.deployments:
        assert entry.work_pool is not None
        assert entry.concurrency_limit is not None


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_entry_point_takes_the_parameters_of_its_deployment(name: str) -> None:
    entry = DEPLOYMENTS[name]
    module = entry["entrypoint"].rsplit(".", 1)[0]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not part of this tree")
    flow = load_flow_from_entrypoint(entry["entrypoint"], use_placeholder_flow=False)
    assert flow.validate_parameters(entry["parameters"])


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_page_of_a_deployment_describes_every_parameter(name: str) -> None:
    schema = parameter_schema(load_flow_from_entrypoint(DEPLOYMENTS[name]["entrypoint"], use_placeholder_flow=False))
    (top,) = schema.properties.values()
    assert top["description"]
    assert find_undescribed(schema.definitions) == []
    untyped = [
        f"{model}.{field}"
        for model, content in schema.definitions.items()
        for field, described in content["properties"].items()
        if not {"type", "anyOf", "$ref", "allOf"} & set(described)
    ]
    assert untyped == []


def find_undescribed(definitions: Mapping[str, Any]) -> list[str]:
    """Fields without a word about them."""
    return [
        f"{model}.{field}"
        for model, content in definitions.items()
        for field, described in content["properties"].items()
        if not described.get("description")
    ]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_schedule_is_one(name: str) -> None:
    for schedule in DEPLOYMENTS[name]["schedules"]:
        if "cron" in schedule:
            CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
        else:
            assert schedule["interval"] > 0


def test_all_deployments_share_a_pool_for_one_run_at_a_time() -> None:
    assert {entry["work_pool"]["name"] for entry in DEPLOYMENTS.values()} == {"entprune-process"}
    assert re.search(r'set-concurrency-limit "\$pool" 1', (INFRA / "prefect/create_pools.sh").read_text())


def test_prefect_reads_the_automations() -> None:
    for entry in yaml.safe_load((INFRA / "prefect/automations.yaml").read_text())["automations"]:
        assert AutomationCore.model_validate(entry).enabled


def test_no_password_is_written_into_a_deployment() -> None:
    assert set(find_environments(PREFECT)) == {"MLFLOW_TRACKING_URI", "RAY_ADDRESS"}


def find_environments(node: Any) -> Iterator[str]:
    """Names of all environment variables in a tree of settings."""
    if isinstance(node, dict):
        yield from node.get("env", {})
        for entry in node.values():
            yield from find_environments(entry)
    elif isinstance(node, list):
        for entry in node:
            yield from find_environments(entry)


# --- Compose ----------------------------------------------------------------------------------------------------------


def test_compose_file_follows_its_specification() -> None:
    checker = program("check-jsonschema")
    assert find_problems(checker, "--builtin-schema", "vendor.compose-spec", INFRA / "compose.yaml") == ""


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_service_refers_to_what_is_declared(name: str) -> None:
    service = COMPOSE["services"][name]
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
    assert {volume.split(":")[0] for volume in service.get("volumes", ())} <= set(COMPOSE["volumes"])
    assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])
    for needed, condition in service.get("depends_on", {}).items():
        if condition["condition"] == "service_healthy":
            assert "healthcheck" in COMPOSE["services"][needed]


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_service_listens_on_this_machine_alone(name: str) -> None:
    service = COMPOSE["services"][name]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert service.get("network_mode") is None
    assert "healthcheck" in service or service["restart"] == "on-failure"  # what ends by itself has none


def test_databases_and_objects_cannot_be_reached_from_outside() -> None:
    assert COMPOSE["networks"]["storage"]["internal"] is True
    for name in ("postgres", "objects"):
        assert COMPOSE["services"][name]["networks"] == ["storage"]
        assert "ports" not in COMPOSE["services"][name]


def test_no_password_stands_in_a_file() -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"./secrets/{name}"}
    text = (INFRA / "compose.yaml").read_text()
    assert not re.search(r"(?i)(password|secret|token)[\w]*:\s*[\"']?[0-9a-z]{8,}[\"']?$", text, re.MULTILINE)
    assert "infra/secrets/" in (ROOT / ".gitignore").read_text().split()


def test_secrets_are_made_once(tmp_path: Path) -> None:
    script = tmp_path / "create_secrets.sh"
    script.write_text((INFRA / "create_secrets.sh").read_text())

    def make() -> dict[str, str]:
        subprocess.run(["/bin/sh", str(script)], check=True)
        return {file.name: file.read_text() for file in (tmp_path / "secrets").iterdir()}

    first = make()
    assert set(first) == set(COMPOSE["secrets"])
    assert len(set(first.values())) == len(first)
    assert all(re.fullmatch(r"[0-9a-f]{48}", secret) for secret in first.values())
    assert make() == first


# --- Ray and Kubernetes -----------------------------------------------------------------------------------------------


def test_ray_accepts_its_cluster() -> None:
    config = yaml.safe_load((INFRA / "ray/cluster.yaml").read_text())
    validate_config(prepare_config(config))
    assert config["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("name", ["storage.yaml", "servers.yaml", "raycluster.yaml", "rayjob.yaml"])
def test_kubernetes_knows_every_field(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    manifest = yaml.safe_load((INFRA / "kuberay" / name).read_text())
    if manifest["apiVersion"] != "ray.io/v1":
        for entry in manifest.get("items", [manifest]):
            validate.validate(entry, validate.latest_version(), strict=True)
        return
    for pod in find_pods(manifest):  # Ray's own kinds are not Kubernetes', the pods in them are
        wrapped = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": pod}
        validate.validate(wrapped, validate.latest_version(), strict=True)


def test_servers_on_kubernetes_find_each_other() -> None:
    entries = yaml.safe_load((INFRA / "kuberay/servers.yaml").read_text())["items"]
    services = [entry for entry in entries if entry["kind"] == "Service"]
    names = {entry["metadata"]["name"] for entry in services}
    templates = [entry["spec"]["template"] for entry in entries if "template" in entry.get("spec", {})]
    labels = {template["metadata"]["labels"]["app"] for template in templates}
    assert {entry["spec"]["selector"]["app"] for entry in services} <= labels
    assert not any("type" in entry["spec"] for entry in services)  # none is open to the outside
    text = (INFRA / "kuberay/servers.yaml").read_text()
    hosts = set(re.findall(r"(?://|@)([a-z][a-z-]*)[:/]", re.sub(r"//\S+@", "@", text)))
    assert hosts == names | {"localhost", "entprune-head-svc"}


@pytest.mark.parametrize(("name", "count"), [("raycluster.yaml", 3), ("rayjob.yaml", 3), ("servers.yaml", 4)])
def test_pods_are_bounded_and_not_root(name: str, count: int) -> None:
    manifest = yaml.safe_load((INFRA / "kuberay" / name).read_text())
    pods, claims = find_pods(manifest), find_claims(manifest)
    assert len(pods) == count
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        declared = {volume["name"] for volume in pod["volumes"]} | claims
        for container in pod["containers"]:
            assert {"requests", "limits"} <= set(container["resources"])
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert {mount["name"] for mount in container["volumeMounts"]} <= declared
            is_in_ray = any(mount["name"] == "ray-token" for mount in container["volumeMounts"])
            assert ({"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]) is is_in_ray
            assert is_in_ray or name == "servers.yaml"


def test_clusters_run_the_release_of_ray_that_is_allowed_here() -> None:
    (bounds,) = re.findall(r'"ray\[default\]>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    cluster = yaml.safe_load((INFRA / "kuberay/raycluster.yaml").read_text())["spec"]
    job = yaml.safe_load((INFRA / "kuberay/rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == job["rayVersion"] == f"{bounds}.0"


def test_image_is_not_run_as_root_and_holds_no_data() -> None:
    lines = (INFRA / "docker/Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001"]
    copied = {line.split()[1] for line in lines if line.startswith("COPY ") and "--from" not in line}
    ignored = (INFRA / "docker/Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert all(f"!{name}" in ignored for name in copied)
    assert all((ROOT / name).exists() for name in copied)


def test_image_follows_the_rules_for_dockerfiles() -> None:
    assert find_problems(program("hadolint"), "--no-color", INFRA / "docker/Dockerfile") == ""


def test_shell_scripts_have_no_traps() -> None:
    scripts = [*sorted(INFRA.rglob("*.sh")), ROOT / ".ci/run"]
    assert len(scripts) == 3
    assert find_problems(program("shellcheck"), *scripts) == ""
