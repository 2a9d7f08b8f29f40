"""The Kubernetes files as `kubectl` would send them, and what Kubernetes would make of their labels and policies."""

import ipaddress
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.kuberay import ray_pods

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "docker" / "kubernetes"
# What a person applies: each is a whole deployment.
DEPLOYMENTS = ("base", "overlays/gpu", "overlays/job", "overlays/job-gpu")
NAMESPACE = "cxr-sweep"

Document = dict[str, Any]


def rendered(folder: Path) -> list[Document]:
    """What `kubectl apply -k` would send of a folder; kustomize reads files alone, no cluster."""
    environment = {**os.environ, "KUBECONFIG": os.devnull}
    made = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60, env=environment
    )
    assert made.returncode == 0, made.stderr
    return [document for document in yaml.safe_load_all(made.stdout) if document]


def of_kind(documents: Sequence[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


@dataclass(frozen=True)
class Pod:
    """A pod that will exist, or one that does not belong to us.

    Attributes:
        name: whose it is, for messages.
        labels: of the pod, with what KubeRay adds.
        spec: its pod spec.
        namespace: where it runs.
        namespace_labels: of its namespace.
    """

    name: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any] = field(default_factory=dict)
    namespace: str = NAMESPACE

    @property
    def namespace_labels(self) -> Mapping[str, str]:
        return {"kubernetes.io/metadata.name": self.namespace}

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        return [*self.spec.get("initContainers", ()), *self.spec.get("containers", ())]


def templates(documents: Sequence[Document]) -> Iterator[tuple[str, Document]]:
    """Every pod template in the documents, with a name for it."""
    for document in documents:
        name = f"{document['kind']}/{document['metadata']['name']}"
        spec = document.get("spec", {})
        if document["kind"] in ("Deployment", "StatefulSet"):
            yield name, spec["template"]
        elif document["kind"] == "Pod":
            yield name, document
        for cluster in clusters([document]):
            yield f"{name} head", cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                yield f"{name} workers {group['groupName']}", group["template"]
        if document["kind"] == "RayJob":
            yield f"{name} submitter", spec["submitterPodTemplate"]


def clusters(documents: Sequence[Document]) -> list[Document]:
    """The specs of all Ray clusters, those of jobs among them."""
    own = [document["spec"] for document in of_kind(documents, "RayCluster")]
    return [*own, *(document["spec"]["rayClusterSpec"] for document in of_kind(documents, "RayJob"))]


def pods(documents: Sequence[Document]) -> list[Pod]:
    """Every pod that will run, those of Ray with what the operator puts into them."""
    found = []
    for name, template in templates(documents):
        if "head" not in name.split() and "workers" not in name:
            found.append(Pod(name, template["metadata"].get("labels", {}), template["spec"]))
    for cluster in clusters(documents):
        found += [Pod(name, labels, spec) for name, labels, spec in ray_pods("sweep", cluster)]
    return found


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels; an empty one takes all."""
    selector = selector or {}
    unknown = set(selector) - {"matchLabels", "matchExpressions"}
    assert not unknown, f"a selector with {unknown}"
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions", ()):
        assert each["operator"] == "In", each
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


def _peer_takes(peer: Mapping[str, Any], pod: Pod | str) -> bool:
    if isinstance(pod, str):  # an address
        block = peer.get("ipBlock")
        if not block:
            return False
        inside = ipaddress.ip_address(pod) in ipaddress.ip_network(block["cidr"])
        return inside and not any(
            ipaddress.ip_address(pod) in ipaddress.ip_network(each) for each in block.get("except", ())
        )
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        here = selects(peer["namespaceSelector"], pod.namespace_labels)
    else:
        here = pod.namespace == NAMESPACE
    return here and selects(peer.get("podSelector"), pod.labels)


def _ports_take(ports: Sequence[Mapping[str, Any]] | None, port: int, protocol: str) -> bool:
    if not ports:
        return True
    return any(each.get("protocol", "TCP") == protocol and each.get("port", port) == port for each in ports)


def may_reach(
    policies: Sequence[Document], source: Pod | str, target: Pod | str, port: int, protocol: str = "TCP"
) -> bool:
    """Whether Kubernetes' network policies let one pod open a connection to another's port.

    Args:
        policies: the NetworkPolicy documents of our namespace.
        source: a pod, or an address outside of the cluster.
        target: the same.
        port: of the target.
        protocol: TCP or UDP.
    """
    return _allowed(policies, "Egress", source, target, port, protocol) and _allowed(
        policies, "Ingress", target, source, port, protocol
    )


def _allowed(
    policies: Sequence[Document], direction: str, of: Pod | str, peer: Pod | str, port: int, protocol: str
) -> bool:
    """Whether the policies of one side let the other come, or be gone to."""
    if isinstance(of, str) or of.namespace != NAMESPACE:
        return True  # our policies are not about it
    own = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], of.labels)
    ]
    if not own:
        return True
    side = "from" if direction == "Ingress" else "to"
    return any(
        (not rule.get(side) or any(_peer_takes(each, peer) for each in rule[side]))
        and _ports_take(rule.get("ports"), port, protocol)
        for spec in own
        for rule in spec.get(direction.lower(), ())
    )


def secret_keys(documents: Sequence[Document]) -> dict[str, set[str]]:
    """The secrets that the documents refer to, and the keys of each that are named or mounted as a file."""
    found: dict[str, set[str]] = {}

    def look(value: Any) -> None:
        if isinstance(value, dict):
            if "secretName" in value:
                found.setdefault(value["secretName"], set()).update(item["key"] for item in value.get("items", ()))
            if isinstance(reference := value.get("secretKeyRef"), dict):
                found.setdefault(reference["name"], set()).add(reference["key"])
            for each in value.values():
                look(each)
        elif isinstance(value, list):
            for each in value:
                look(each)

    look(json.loads(json.dumps(documents)))
    return found
