"""The YAML and Docker files of cluster/: their structure, and what must never stand in them.

Nothing here reaches a cloud: KubeRay's fields are checked by hand against its v1 types, the file for `ray up` by
Ray's own schema.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from lock import locked_versions
from stub_programs import CLUSTER

from moe_evo.config.file import read_config
from moe_evo.config.run import RunConfig

SCRIPTS = sorted(CLUSTER.glob("*.sh"))

# the fields of rayjob_types.go and raycluster_types.go (KubeRay 1.5 to 1.7) that a file may use
JOB_FIELDS = {
    "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
    "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
    "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
    "shutdownAfterJobFinishes", "suspend",
}  # fmt: skip
CLUSTER_FIELDS = {
    "authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs",
}  # fmt: skip
HEAD_FIELDS = {"template", "headService", "enableIngress", "resources", "labels", "rayStartParams", "serviceType"}
WORKER_FIELDS = {
    "suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "resources", "labels",
    "rayStartParams", "template", "scaleStrategy", "numOfHosts",
}  # fmt: skip


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    """The documents of rayjob.yaml by kind."""
    found = list(yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text()))
    by_kind = {one["kind"]: one for one in found}
    assert len(by_kind) == len(found)
    return by_kind


@pytest.fixture(scope="module")
def job(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    assert documents["RayJob"]["apiVersion"] == "ray.io/v1"
    spec: dict[str, Any] = documents["RayJob"]["spec"]
    return spec


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_a_rayjob_has_only_fields_that_kuberay_knows(job: dict[str, Any]) -> None:
    cluster = job["rayClusterSpec"]
    assert set(job) <= JOB_FIELDS
    assert set(cluster) <= CLUSTER_FIELDS
    assert set(cluster["headGroupSpec"]) <= HEAD_FIELDS and cluster["headGroupSpec"].keys() >= {"template"}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_FIELDS
        assert group.keys() >= {"groupName", "template", "minReplicas", "maxReplicas"}, "required by the CRD"
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert all(isinstance(value, str) for value in cluster["headGroupSpec"]["rayStartParams"].values())
    assert job["submissionMode"] in {"K8sJobMode", "HTTPMode", "SidecarMode"}


def test_a_rayjob_ends_its_cluster_and_retries_the_search(job: dict[str, Any]) -> None:
    assert job["shutdownAfterJobFinishes"] is True and job["ttlSecondsAfterFinished"] > 0
    assert job["backoffLimit"] >= 1 and job["activeDeadlineSeconds"] > 0
    words = job["entrypoint"].split()
    assert words[:4] == ["python", "-m", "moe_evo", "search"]
    assert words[words.index("--cluster.address") + 1] == "auto"


def test_the_run_folder_of_a_rayjob_lies_on_the_volume_of_every_pod(
    job: dict[str, Any], documents: dict[str, dict[str, Any]]
) -> None:
    words = job["entrypoint"].split()
    folder = Path(words[words.index("--folder") + 1])
    claim = documents["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(job):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {Path(mount["mountPath"]): volumes[mount["name"]] for mount in container["volumeMounts"]}
        holder = next(volume for path, volume in mounts.items() if path in folder.parents)
        assert holder["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mounts[Path("/dev/shm")]["emptyDir"]["medium"] == "Memory"


def test_the_head_of_a_rayjob_has_no_gpu_and_the_workers_room_for_the_gangs(
    job: dict[str, Any], documents: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    head, *workers = pods(job)
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    groups = job["rayClusterSpec"]["workerGroupSpecs"]
    gpus = sum(
        group["maxReplicas"] * int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for group, pod in zip(groups, workers, strict=True)
    )
    config = the_config(documents, tmp_path)
    assert isinstance(config.cluster.num_gangs, int)
    assert config.cluster.num_gangs * config.cluster.gang_size == gpus


def the_config(documents: dict[str, dict[str, Any]], folder: Path) -> RunConfig:
    """The search in the ConfigMap, with the flag of the entrypoint that sharding asks for."""
    content = yaml.safe_load(documents["ConfigMap"]["data"]["search.yaml"])
    content["cluster"]["address"] = "auto"
    (folder / "search.yaml").write_text(yaml.safe_dump(content))
    return read_config(folder / "search.yaml")


def test_the_config_of_the_rayjob_reads_and_asks_for_gpus(
    documents: dict[str, dict[str, Any]], job: dict[str, Any], tmp_path: Path
) -> None:
    config = the_config(documents, tmp_path)
    assert config.model.path.startswith("/shared/") and config.cluster.resources == {"GPU": 1, "CPU": 4}
    assert f"/{job['entrypoint'].split()[4].rsplit('/', 1)[1]}" == "/search.yaml"


def test_pods_run_without_root_and_take_secrets_by_name(job: dict[str, Any]) -> None:
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for pod in pods(job):
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        for variable in pod["containers"][0]["env"]:
            assert "value" not in variable and variable["valueFrom"]["secretKeyRef"]["optional"] is True


@pytest.fixture(scope="module")
def ray_up() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CLUSTER / "ray-up-aws.yaml").read_text())
    return content


def test_ray_accepts_the_file_for_ray_up(ray_up: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.chdir(CLUSTER.parent)
    validate_config(prepare_config(ray_up))


def test_what_ray_up_starts_is_closed_to_the_world(ray_up: dict[str, Any]) -> None:
    commands = ray_up["head_start_ray_commands"] + ray_up["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2 and all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    rules = ray_up["provider"]["security_group"]["IpPermissions"]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in rules] == [(22, 22)]
    assert all(one["CidrIp"] != "0.0.0.0/0" for rule in rules for one in rule["IpRanges"])


def test_ray_up_grows_gpu_workers_from_none_and_keeps_work_off_the_head(ray_up: dict[str, Any]) -> None:
    head, gpu = ray_up["available_node_types"]["head"], ray_up["available_node_types"]["gpu"]
    assert head["resources"] == {"CPU": 0} and "min_workers" not in head
    assert gpu["min_workers"] == 0 and 0 < gpu["max_workers"] <= ray_up["max_workers"]
    assert gpu["resources"]["GPU"] > 0


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile in order, continued lines joined, comments dropped."""
    lines = [line for line in (CLUSTER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.strip().split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in pairs]


def test_the_image_is_a_slim_python_3_11_that_does_not_run_as_root(instructions: list[tuple[str, str]]) -> None:
    assert instructions[0] == ("FROM", "python:3.11-slim-bookworm")
    names = [name for name, _ in instructions]
    assert set(names) <= {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR", "CMD"}
    user = dict(instructions)["USER"]
    assert names.count("USER") == 1 and int(user) > 0
    assert "RUN" not in names[names.index("USER") :]


def test_the_image_holds_the_package_with_deepspeed_and_any_torch(instructions: list[tuple[str, str]]) -> None:
    runs = " ".join(rest for name, rest in instructions if name == "RUN")
    arguments = [rest.split("=")[0] for name, rest in instructions if name == "ARG"]
    assert "/source[deepspeed]" in runs and {"TORCH", "PIP_INDEX_URL", "RAY"} <= set(arguments)
    copied = {word for name, rest in instructions if name == "COPY" for word in rest.split()[:-1]}
    root = CLUSTER.parent
    assert all((root / word).exists() for word in copied)
    ignore = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert ignore[0] == "*" and {line.lstrip("!") for line in ignore if line.startswith("!")} == copied


def test_image_nodes_and_ray_job_have_the_locked_ray(instructions: list[tuple[str, str]], job: dict[str, Any]) -> None:
    nodes = (CLUSTER / "ray-up-aws.yaml").read_text()
    installs = [rest for name, rest in instructions if name == "RUN" and "pip install" in rest]
    installs += [line for line in nodes.splitlines() if "pip install" in line]
    assert len(installs) == 3 and all(re.search(r"(-c|--constraint) \S+/constraints\.txt", one) for one in installs)
    assert job["rayClusterSpec"]["rayVersion"] == locked_versions()["ray"]


@pytest.mark.parametrize("path", sorted(CLUSTER.iterdir()), ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    text = path.read_text()
    secrets = r"hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|[0-9a-f]{40,}|ghp_[A-Za-z0-9]{20,}"
    assert re.findall(secrets, text) == []
    given = r"(?:RAY_AUTH_TOKEN|HF_TOKEN|WANDB_API_KEY)[=:](?!-)[ ]*[^\s$,})`]+"
    names = {"PATH"}  # of the example that reads a value from a file
    assert [one for one in re.findall(given, text) if re.split(r"[=:]\s*", one, maxsplit=1)[1] not in names] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_that_stops_at_errors(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(path: Path) -> None:
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
