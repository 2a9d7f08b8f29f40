"""What KubeRay takes and makes, as its published API reference (1.6) and its operator's behaviour say.

No package index that we know carries KubeRay's own definitions: these are facts written down, not its schema. The pod
templates inside are checked against Kubernetes' schema. 1.5.1, the oldest release we name, has all these fields.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

TEXT, WHOLE, NUMBER, TRUTH = "text", "whole number", "number", "true or false"
TEXTS = "object of texts"
PYTHON = {TEXT: str, WHOLE: int, NUMBER: (int, float), TRUTH: bool}

POD_TEMPLATE, CONTAINER_PART, SERVICE = "pod template", "part of a container", "service"

# Kind of object: its fields, with the kind of each; a set holds the values allowed, a list one kind of element.
KINDS: dict[str, dict[str, Any]] = {
    "RayCluster": {"apiVersion": {"ray.io/v1"}, "kind": {"RayCluster"}, "metadata": "metadata", "spec": "cluster"},
    "RayJob": {"apiVersion": {"ray.io/v1"}, "kind": {"RayJob"}, "metadata": "metadata", "spec": "job"},
    "metadata": {"name": TEXT, "namespace": TEXT, "labels": TEXTS, "annotations": TEXTS},
    "cluster": {
        "authOptions": "auth",
        "suspend": TRUTH,
        "autoscalerOptions": "autoscaler",
        "headServiceAnnotations": TEXTS,
        "enableInTreeAutoscaling": TRUTH,
        "headGroupSpec": "head",
        "rayVersion": TEXT,
        "workerGroupSpecs": ["workers"],
    },
    "auth": {"mode": {"disabled", "token"}},  # 1.6 has secretName, too
    "autoscaler": {
        "resources": CONTAINER_PART,
        "image": TEXT,
        "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
        "securityContext": CONTAINER_PART,
        "idleTimeoutSeconds": WHOLE,
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
        "version": {"v1", "v2"},
        "env": CONTAINER_PART,
        "envFrom": CONTAINER_PART,
        "volumeMounts": CONTAINER_PART,
    },
    "head": {
        "template": POD_TEMPLATE,
        "headService": SERVICE,
        "enableIngress": TRUTH,
        "resources": TEXTS,
        "labels": TEXTS,
        "rayStartParams": TEXTS,
        "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"},
    },
    "workers": {
        "groupName": TEXT,
        "replicas": WHOLE,
        "minReplicas": WHOLE,
        "maxReplicas": WHOLE,
        "idleTimeoutSeconds": WHOLE,
        "resources": TEXTS,
        "labels": TEXTS,
        "rayStartParams": TEXTS,
        "template": POD_TEMPLATE,
        "numOfHosts": WHOLE,
    },
    "job": {
        "activeDeadlineSeconds": WHOLE,
        "backoffLimit": WHOLE,
        "rayClusterSpec": "cluster",
        "submitterPodTemplate": POD_TEMPLATE,
        "metadata": TEXTS,
        "clusterSelector": TEXTS,
        "submitterConfig": "submitter",
        "entrypoint": TEXT,
        "runtimeEnvYAML": TEXT,
        "jobId": TEXT,
        "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
        "entrypointResources": TEXT,
        "entrypointNumCpus": NUMBER,
        "entrypointNumGpus": NUMBER,
        "ttlSecondsAfterFinished": WHOLE,
        "shutdownAfterJobFinishes": TRUTH,
        "suspend": TRUTH,
    },
    "submitter": {"backoffLimit": WHOLE},
}
REQUIRED = {
    "RayCluster": {"apiVersion", "kind", "metadata", "spec"},
    "RayJob": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name"},
    "cluster": {"headGroupSpec"},
    "head": {"template"},
    "workers": {"groupName", "minReplicas", "maxReplicas", "template"},
}
OF_ITS_CONTAINER = set(KINDS["autoscaler"]) - {"idleTimeoutSeconds", "upscalingMode", "version"}
LONGEST_NAME = 63 - len("-head-svc-abcde")  # of a cluster; the operator makes others of it


def problems(document: Mapping[str, Any]) -> list[str]:
    """What KubeRay would not take of a document, in words; what Kubernetes' own schemas say is left to these."""
    kind = document["kind"]
    found = list(_unlike(document, kind, kind))
    if found:
        return found
    name = document["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > LONGEST_NAME:
        found.append(f"{kind}.metadata.name: {name!r} is no short DNS label")
    spec = document["spec"]
    cluster = spec if kind == "RayCluster" else spec.get("rayClusterSpec")
    if kind == "RayJob":
        found += _problems_of_job(spec)
    return [*found, *_problems_of_cluster(cluster)] if cluster else found


def _unlike(value: Any, kind: Any, where: str) -> Iterator[str]:
    """Where a value is not of the kind it should be."""
    if kind in (POD_TEMPLATE, CONTAINER_PART, SERVICE):
        return
    if isinstance(kind, set):
        if value not in kind:
            yield f"{where}: expected one of {sorted(kind)}, but got {value!r}"
    elif isinstance(kind, list):
        for number, each in enumerate(value):
            yield from _unlike(each, kind[0], f"{where}[{number}]")
    elif kind == TEXTS:
        for key, each in value.items():
            if not isinstance(each, str):
                yield f"{where}.{key}: expected a text, but got {each!r}"
    elif kind in KINDS:
        for key in sorted(REQUIRED.get(kind, set()) - set(value)):
            yield f"{where}: lacks {key}"
        for key, each in value.items():
            if key not in KINDS[kind]:
                yield f"{where}: has no field {key!r}"
            else:
                yield from _unlike(each, KINDS[kind][key], f"{where}.{key}")
    elif not isinstance(value, PYTHON[kind]) or (isinstance(value, bool) and kind != TRUTH):
        yield f"{where}: expected {kind}, but got {value!r}"


def _problems_of_cluster(cluster: Mapping[str, Any]) -> Iterator[str]:
    head, groups = cluster["headGroupSpec"], cluster.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        yield f"two groups of workers share a name: {names}"
    for group in groups:
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield f"group {group['groupName']}: replicas are not between the least and the most"
    for each in (head, *groups):
        name = each.get("groupName", "head")
        if not each["template"]["spec"].get("containers"):
            yield f"{name}: has no container"
        if each.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(each["rayStartParams"]):
            yield f"{name}: resources stand in two places"
        if "labels" in each["rayStartParams"]:
            yield f"{name}: rayStartParams has labels, which belong into the group"
        if cluster.get("enableInTreeAutoscaling") and each["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: restartPolicy has to be Never with autoscaler v2"
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = tuple(int(part) for part in cluster.get("rayVersion", "0").split("."))
        if version < (2, 52, 0):
            yield f"rayVersion: {cluster.get('rayVersion')!r} knows no token, 2.52.0 is the first that does"


def _problems_of_job(job: Mapping[str, Any]) -> Iterator[str]:
    if ("rayClusterSpec" in job) == ("clusterSelector" in job):
        yield "a job has either a cluster of its own or one that it selects"
    if job.get("ttlSecondsAfterFinished", 0) and not job.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished works with shutdownAfterJobFinishes only"
    if job.get("backoffLimit", 0) < 0 or job.get("activeDeadlineSeconds", 1) <= 0:
        yield "backoffLimit and activeDeadlineSeconds may not be negative"
    if not isinstance(yaml.safe_load(job.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no YAML of a runtime environment"
    if job.get("submissionMode") == "SidecarMode" and "submitterPodTemplate" in job:
        yield "SidecarMode has no submitterPodTemplate"


def ray_pods(name: str, cluster: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """The pods the operator makes of a cluster: whose each is, its labels, its spec with what is put into it."""
    groups = [("head", "headgroup", cluster["headGroupSpec"])]
    groups += [("worker", group["groupName"], group) for group in cluster["workerGroupSpecs"]]
    with_token = cluster.get("authOptions", {}).get("mode") == "token"
    for kind, group, part in groups:
        template = copy.deepcopy(part["template"])
        labels = {
            "ray.io/cluster": name,
            "ray.io/node-type": kind,
            "ray.io/group": group,
            "app.kubernetes.io/name": "kuberay",
            "app.kubernetes.io/created-by": "kuberay-operator",
        }
        labels = {**labels, **template["metadata"].get("labels", {})}
        spec = template["spec"]
        first = spec["containers"][0]
        if kind == "worker":
            spec["initContainers"] = [
                *spec.get("initContainers", ()),
                {**copy.deepcopy(first), "name": "wait-gcs-ready"},
            ]
        elif cluster.get("enableInTreeAutoscaling"):
            options = cluster.get("autoscalerOptions", {})
            own = {key: options[key] for key in OF_ITS_CONTAINER if key in options}
            spec["containers"].append({"image": first["image"], **own, "name": "autoscaler"})
        if with_token:
            for container in (*spec["containers"], *spec.get("initContainers", ())):
                container.setdefault("env", []).append({"name": "RAY_AUTH_MODE", "value": "token"})
                reference = {"secretKeyRef": {"name": name, "key": "auth_token"}}
                container["env"].append({"name": "RAY_AUTH_TOKEN", "valueFrom": reference})
        yield f"{name} {kind} {group}", labels, spec
