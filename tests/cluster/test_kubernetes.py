"""The Kubernetes files: they pass the published schemas, and keep what docs/SECURITY.md says of them.

Checked here, not run on a cluster. Needs `kubectl` (for kustomize; no cluster) and the package `kubernetes-validate`,
which carries Kubernetes' own schemas.
"""

import ast
import copy
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.cluster import manifests
from tests.cluster.conftest import lacking
from tests.cluster.kuberay import problems
from tests.cluster.manifests import DEPLOYMENTS, KUBERNETES, NAMESPACE, Document, Pod, may_reach, of_kind, pods

OLDEST, NEWEST = "1.33", "1.37"  # of Kubernetes, the releases whose schemas the package has
SCRIPTS = KUBERNETES / "base" / "scripts"
MADE_BY_OPERATOR = {"sweep"}  # the secret with the cluster's token has the cluster's name

STRANGER = Pod("a pod of another namespace", {"app.kubernetes.io/component": "ray-head"}, namespace="other")
OPERATOR = Pod("the operator", {"app.kubernetes.io/component": "kuberay-operator"}, namespace="kuberay-system")
IMPOSTOR = Pod("no operator", {"app.kubernetes.io/component": "kuberay-operator"}, namespace="other")
DNS = Pod("DNS", {"k8s-app": "kube-dns"}, namespace="kube-system")
MONITORING = Pod("Prometheus", {}, namespace="monitoring")
OUTSIDE = "203.0.113.7"

Rendered = dict[str, list[Document]]


@pytest.fixture(scope="module")
def deployments() -> Rendered:
    if not shutil.which("kubectl"):
        lacking(["kubectl, for kustomize"])
    return {name: manifests.rendered(KUBERNETES / name) for name in DEPLOYMENTS}


@pytest.fixture(params=DEPLOYMENTS)
def documents(request, deployments) -> list[Document]:
    return deployments[request.param]


@pytest.fixture(scope="module")
def validate() -> Callable[[Document, str], None]:
    try:
        import kubernetes_validate
    except ImportError:
        lacking(["the package kubernetes-validate"])

    def check(document: Document, version: str) -> None:
        kubernetes_validate.validate(document, version, strict=True)

    return check


def everything_extra() -> list[Document]:
    """The components that are not part of a deployment of ours, and the pod that loads data."""
    texts = [
        path.read_text() for path in (*KUBERNETES.glob("components/*/network.yaml"), KUBERNETES / "load-data.yaml")
    ]
    return [document for text in texts for document in yaml.safe_load_all(text)]


# --- Schemas


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_what_is_kubernetes_own_passes_its_published_schemas(documents, validate, version):
    for document in [*documents, *everything_extra()]:
        if not document["apiVersion"].startswith("ray.io/"):
            validate(document, version)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_pods_of_ray_pass_kubernetes_schemas_with_what_the_operator_adds(documents, validate, version):
    for _, template in manifests.templates(documents):
        validate(_alone(template["spec"], template["metadata"].get("labels", {})), version)
    for pod in pods(documents):
        validate(_alone(pod.spec, pod.labels), version)


def _alone(spec: Document, labels: Document) -> Document:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "alone", "labels": dict(labels)}, "spec": spec}


def test_the_schemas_find_what_is_wrong(deployments, validate):
    """A check that cannot fail says nothing."""
    pod = pods(deployments["base"])[0]
    for path, value in {"securityContex": {}, "terminationGracePeriodSeconds": "soon"}.items():
        with pytest.raises(Exception, match=r"securityContex|soon"):
            validate(_alone({**pod.spec, path: value}, pod.labels), NEWEST)


def test_ray_clusters_and_jobs_have_the_fields_that_kuberay_knows(documents):
    own = [document for document in documents if document["apiVersion"].startswith("ray.io/")]
    assert len(own) == 1
    assert problems(own[0]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda spec: spec.update(authOption={}), "no field 'authOption'"),
        (lambda spec: spec["authOptions"].update(mode="tokens"), "expected one of"),
        (lambda spec: spec.update(rayVersion="2.51.0"), "knows no token"),
        (lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "expected a text"),
        (lambda spec: spec["workerGroupSpecs"][0].update(minReplicas=9), "between the least and the most"),
        (lambda spec: spec["workerGroupSpecs"][0].pop("groupName"), "lacks groupName"),
        (lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="8"), "expected whole number"),
        (lambda spec: spec["headGroupSpec"]["template"]["spec"].update(restartPolicy="Always"), "has to be Never"),
    ],
)
def test_kuberay_would_refuse(deployments, change, said):
    cluster = copy.deepcopy(of_kind(deployments["base"], "RayCluster")[0])
    change(cluster["spec"])
    assert any(said in each for each in problems(cluster))


def test_rays_own_autoscaler_reads_the_groups(documents):
    """The code that reads a RayCluster inside the head pod, from the Ray that is installed."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    for spec in manifests.clusters(documents):
        resource = {"metadata": {"name": "sweep", "namespace": NAMESPACE}, "spec": spec}
        config = _derive_autoscaling_config_from_ray_cr(resource)
        types = config["available_node_types"]
        assert types["headgroup"]["resources"]["CPU"] == 0
        for group in spec["workerGroupSpecs"]:
            found = types[group["groupName"]]
            assert (found["min_workers"], found["max_workers"]) == (group["minReplicas"], group["maxReplicas"])
            assert found["resources"]["CPU"] == 8
            assert found["resources"].get("GPU", 0) == (1 if group["groupName"] == "gpu" else 0)
        assert config["idle_timeout_minutes"] == 10


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_start_knows_every_parameter(documents):
    from ray.scripts.scripts import start

    known = {name.removeprefix("--") for option in start.params for name in option.opts}
    for spec in manifests.clusters(documents):
        for part in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert set(part["rayStartParams"]) <= known


def test_the_gpu_overlays_ask_for_gpus_and_the_others_do_not(deployments):
    for name, documents in deployments.items():
        asked = [
            container["resources"]["limits"].get("nvidia.com/gpu")
            for pod in pods(documents)
            for container in pod.spec["containers"]
            if pod.labels.get("ray.io/node-type") == "worker"
        ]
        assert asked == (["1"] if "gpu" in name else [None])


def test_a_job_has_the_cluster_of_the_base(deployments):
    """There is one description of the nodes, and it goes where it is needed."""
    for job, cluster in (("overlays/job", "base"), ("overlays/job-gpu", "overlays/gpu")):
        assert not of_kind(deployments[job], "RayCluster")
        assert (
            of_kind(deployments[job], "RayJob")[0]["spec"]["rayClusterSpec"]
            == (of_kind(deployments[cluster], "RayCluster")[0]["spec"])
        )


# --- The guide


GUIDE = (manifests.ROOT / "docs" / "CLUSTER.md").read_text()
KUBERNETES_CHAPTER = GUIDE.partition("## Kubernetes\n")[2].partition("\n## ")[0]
SLURM_CHAPTER = GUIDE.partition("## Slurm\n")[2].partition("\n## ")[0]


def test_the_guide_names_what_there_is(deployments):
    text = KUBERNETES_CHAPTER + SLURM_CHAPTER
    files = set(re.findall(r"(?:docker|search_spaces)/[\w./-]+", text)) - {"docker/kubernetes/overlays/own"}
    files -= {"docker/kubernetes/overlays/own/kustomization.yaml"}
    assert {"docker/slurm/sweep.sbatch", "docker/kubernetes/make-secrets"} <= files
    for name in files:
        assert (manifests.ROOT / name.removeprefix("../")).exists(), name
    services = {each["metadata"]["name"]: each for each in of_kind(deployments["base"], "Service")}
    cluster = of_kind(deployments["base"], "RayCluster")[0]["metadata"]["name"]
    for name in re.findall(r"service/([\w-]+)", text):
        assert name in services or name == f"{cluster}-head-svc"
    assert f"get secret {cluster} " in text
    jobs = [each["metadata"]["name"] for each in of_kind(deployments["overlays/job"], "RayJob")]
    assert re.findall(r" job/([\w-]+)", text) == jobs
    for chapter in (KUBERNETES_CHAPTER, SLURM_CHAPTER):
        assert "not run on a" in chapter.split("\n\n")[0].replace("\n", " ")


def test_the_guides_own_folder_renders_with_its_images(tmp_path, deployments):
    (text,) = re.findall(r"```yaml\n(.*?)```", KUBERNETES_CHAPTER, re.DOTALL)
    own = yaml.safe_load(text)
    for kind in ("resources", "components"):
        lies = [(KUBERNETES / "overlays" / "own" / each).resolve() for each in own[kind]]
        own[kind] = [os.path.relpath(each, tmp_path.resolve()) for each in lies]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(own))
    documents = manifests.rendered(tmp_path)
    images = {
        container["image"] for pod in pods(documents) for container in pod.containers if "postgres" not in pod.name
    }
    assert images == {"registry.example.org/cxr-sweep:0.1.0", "registry.example.org/cxr-sweep:0.1.0-gpu"}
    assert "https" in {each["metadata"]["name"] for each in of_kind(documents, "NetworkPolicy")}
    assert len(documents) == len(deployments["overlays/gpu"]) + 1


# --- What pods may do


def test_pods_are_held_to_the_restricted_standard(documents):
    namespace = of_kind(documents, "Namespace")[0]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    loader = Pod("loader", {}, of_kind(everything_extra(), "Pod")[0]["spec"])
    for pod in [*pods(documents), loader]:
        shared = pod.spec.get("securityContext", {})
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec), pod.name
        assert all("hostPath" not in volume for volume in pod.spec["volumes"]), pod.name
        for container in pod.containers:
            own = container.get("securityContext", {})
            both = {**shared, **own}
            where = f"{pod.name}: {container['name']}"
            assert both.get("runAsNonRoot") is True, where
            assert both.get("runAsUser", 0) > 0, where
            assert both.get("seccompProfile", {}).get("type") == "RuntimeDefault", where
            assert own.get("allowPrivilegeEscalation") is False, where
            assert own.get("capabilities") == {"drop": ["ALL"]}, where
            assert own.get("readOnlyRootFilesystem") is True, where
            assert "privileged" not in own, where
            assert all("hostPort" not in port for port in container.get("ports", ())), where


def test_only_the_head_has_an_account_and_only_for_its_autoscaler(documents):
    for pod in pods(documents):
        assert pod.spec["automountServiceAccountToken"] is (pod.labels.get("ray.io/node-type") == "head"), pod.name


def test_every_container_says_what_it_needs_and_what_it_may_take(documents):
    for pod in pods(documents):
        for container in pod.containers:
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]) & set(resources["limits"]), pod.name
            assert resources["requests"]["memory"] == resources["limits"]["memory"], pod.name
            if pod.labels.get("ray.io/node-type"):
                assert resources["requests"] == resources["limits"], pod.name


def test_images_are_pinned(documents):
    for pod in [*pods(documents), Pod("loader", {}, of_kind(everything_extra(), "Pod")[0]["spec"])]:
        for container in pod.containers:
            _, _, tag = container["image"].rpartition(":")
            assert re.match(r"[0-9]+\.[0-9]+", tag), f"{pod.name}: {container['image']}"


def test_what_has_to_last_is_on_volumes_and_everything_named_exists(documents):
    claims = {each["metadata"]["name"] for each in of_kind(documents, "PersistentVolumeClaim")}
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(documents, "ConfigMap")}
    for pod in pods(documents):
        templates = {
            each["metadata"]["name"]
            for owner in of_kind(documents, "StatefulSet")
            if owner["spec"]["template"]["spec"] == pod.spec
            for each in owner["spec"]["volumeClaimTemplates"]
        }
        named = {volume["name"] for volume in pod.spec["volumes"]} | templates
        for volume in pod.spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims, pod.name
            if "configMap" in volume:
                assert volume["configMap"]["name"] in maps, pod.name
        for container in pod.containers:
            mounts = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
            assert len(set(mounts)) == len(mounts), pod.name
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= named, pod.name
            assert "/tmp" in mounts or "/tmp/ray" in mounts, f"{pod.name}: nothing is writable otherwise"
    for pod in pods(documents):
        if pod.labels.get("ray.io/node-type") == "head":
            mounts = {mount["mountPath"]: mount for mount in pod.spec["containers"][0]["volumeMounts"]}
            assert mounts["/data"]["readOnly"] is True
            assert {"/runs", "/cache", "/dev/shm", "/opt/sweep"} <= set(mounts)


def test_services_and_budgets_select_pods_that_exist_and_ports_that_they_have(documents):
    every = pods(documents)
    for service in of_kind(documents, "Service"):
        chosen = [pod for pod in every if selected(service["spec"]["selector"], pod)]
        assert len(chosen) == 1, service["metadata"]["name"]
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
        ports = {port["name"]: port["containerPort"] for port in chosen[0].spec["containers"][0]["ports"]}
        assert all(ports[port["targetPort"]] == port["port"] for port in service["spec"]["ports"])
    for budget in of_kind(documents, "PodDisruptionBudget"):
        chosen = [pod for pod in every if manifests.selects(budget["spec"]["selector"], pod.labels)]
        assert [pod.labels["ray.io/node-type"] for pod in chosen] == ["head"]
    for policy in of_kind(documents, "NetworkPolicy"):
        if policy["metadata"]["name"] not in ("default-deny", "names"):
            assert any(manifests.selects(policy["spec"]["podSelector"], pod.labels) for pod in every), policy[
                "metadata"
            ]
    assert not of_kind(documents, "Ingress")


def selected(selector: dict[str, str], pod: Pod) -> bool:
    return manifests.selects({"matchLabels": selector}, pod.labels)


def test_probes_ask_ports_that_the_container_has_or_ray_opens(documents):
    for pod in pods(documents):
        if "submitter" in pod.name:
            continue
        container = pod.spec["containers"][0]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe].get("httpGet")
            if not asked:
                assert container[probe]["exec"]["command"], pod.name
            elif pod.labels.get("ray.io/node-type"):
                # Open without a token in the Ray that is installed, and of the raylet and, on the head, of the GCS.
                assert (asked["path"], asked["port"]) == ("/api/healthz", 52365)
            else:
                assert asked["port"] in {port["name"] for port in container["ports"]}


def test_rays_health_is_told_without_a_token():
    source = importlib.util.find_spec("ray.dashboard").submodule_search_locations[0]
    tree = ast.parse((Path(source) / "http_server_agent.py").read_text())
    public = {
        ast.unparse(target): ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
        for target in node.targets
    }
    assert "/api/healthz" in public["PUBLIC_EXACT_PATHS"]


# --- Secrets


def test_no_secret_stands_in_the_files(documents):
    assert not of_kind(documents, "Secret")
    for pod in pods(documents):
        for container in pod.containers:
            for each in container.get("env", ()):
                if re.search(r"PASSW|TOKEN|SECRET|CREDENTIAL|KEY", each["name"]) and "value" in each:
                    assert each["name"].endswith(("_FILE", "_PATH")), f"{pod.name}: {each['name']}"
    text = "".join(path.read_text() for path in KUBERNETES.rglob("*") if path.is_file())
    assert not re.search(r"://[^/\s:@]+:[^/\s@]+@", text)  # an address with a password


def test_the_token_is_asked_for_everywhere(documents):
    for spec in manifests.clusters(documents):
        assert spec["authOptions"] == {"mode": "token"}
    for pod in pods(documents):
        if pod.labels.get("ray.io/node-type"):
            for container in pod.containers:
                env = {each["name"]: each for each in container["env"]}
                assert env["RAY_AUTH_MODE"]["value"] == "token"
                assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == "auth_token"


def test_who_is_handed_which_secret(documents):
    handed = {}
    for pod in pods(documents):
        part = pod.labels["app.kubernetes.io/component"]
        handed.setdefault(part, set()).update(set(manifests.secret_keys([dict(pod.spec)])) - MADE_BY_OPERATOR)
    expected = {
        "ray-head": {"mlflow-client"},
        "mlflow": {"mlflow-server"},
        "postgres": {"postgres"},
        "ray-worker": set(),
    }
    assert {part: names for part, names in handed.items() if part != "submitter"} == expected
    assert handed.get("submitter", set()) == set()


# --- Who may reach whom


def part(documents: list[Document], name: str) -> Pod:
    return next(pod for pod in pods(documents) if pod.labels["app.kubernetes.io/component"] == name)


def test_nobody_reaches_what_is_not_for_them(documents):
    policies = of_kind(documents, "NetworkPolicy")
    head, worker, mlflow, postgres = (part(documents, n) for n in ("ray-head", "ray-worker", "mlflow", "postgres"))
    inside = {pod.name: pod for pod in pods(documents)}
    ray = {head.name, worker.name}
    open_to = {
        (head.name, mlflow.name, 5000),
        (mlflow.name, postgres.name, 5432),
        *((a, b, port) for a in ray for b in ray for port in (6379, 8265, 10001, 8080, 5000, 5432, 22, 11000)),
        *((pod.name, head.name, 8265) for pod in inside.values() if "submitter" in pod.name),
    }
    found = {
        (source.name, target.name, port)
        for source in inside.values()
        for target in inside.values()
        for port in (22, 5000, 5432, 6379, 8080, 8265, 10001, 11000)
        if source is not target and may_reach(policies, source, target, port)
    }
    assert found == {each for each in open_to if each[0] != each[1]}


def test_nothing_comes_in_from_outside_of_the_namespace_but_the_operator(documents):
    policies = of_kind(documents, "NetworkPolicy")
    for target in pods(documents):
        for port in (22, 5000, 5432, 6379, 8080, 8265, 10001, 11000):
            for source in (STRANGER, IMPOSTOR, MONITORING, DNS, OUTSIDE):
                assert not may_reach(policies, source, target, port), (target.name, port)
            operator_may = target.labels["app.kubernetes.io/component"] == "ray-head" and port == 8265
            assert may_reach(policies, OPERATOR, target, port) is operator_may, (target.name, port)


def test_nothing_goes_out_of_the_namespace_but_names_and_the_autoscalers_questions(documents):
    policies = of_kind(documents, "NetworkPolicy")
    for source in pods(documents):
        assert may_reach(policies, source, DNS, 53, "UDP")
        assert may_reach(policies, source, DNS, 53)
        assert not may_reach(policies, source, STRANGER, 443)
        for port in (22, 53, 80, 443, 8265):
            assert not may_reach(policies, source, OUTSIDE, port), source.name
            assert not may_reach(policies, source, "169.254.169.254", port), "the cloud's metadata, with its keys"
        to_api = source.labels["app.kubernetes.io/component"] == "ray-head"
        assert may_reach(policies, source, "10.96.0.1", 443) is to_api
        assert not may_reach(policies, source, "10.96.0.1", 80)


def test_the_components_open_what_they_say_and_no_more(deployments):
    base = deployments["base"]
    added = {
        path.parent.name: list(yaml.safe_load_all(path.read_text()))
        for path in KUBERNETES.glob("components/*/network.yaml")
    }
    policies = of_kind(base, "NetworkPolicy")
    head, worker, mlflow = (part(base, name) for name in ("ray-head", "ray-worker", "mlflow"))
    https = [*policies, *added["https"]]
    assert may_reach(https, head, OUTSIDE, 443)
    assert not may_reach(https, head, OUTSIDE, 80)
    assert not may_reach(https, worker, OUTSIDE, 443)
    assert not may_reach(https, mlflow, OUTSIDE, 443)
    assert not may_reach(https, head, "169.254.169.254", 443)
    assert not may_reach(https, head, "10.1.2.3", 80)
    watched = [*policies, *added["prometheus"]]
    assert may_reach(watched, MONITORING, head, 8080)
    assert may_reach(watched, MONITORING, worker, 8080)
    assert not may_reach(watched, MONITORING, head, 8265)
    assert not may_reach(watched, MONITORING, mlflow, 8080)
    assert not may_reach(watched, STRANGER, head, 8080)


def test_the_policies_are_read_right():
    """The reader of policies itself: without any, everything is open; an empty rule opens all; an exception closes."""
    one = Pod("one", {"app": "one"})
    deny = {"spec": {"podSelector": {}, "policyTypes": ["Ingress"]}}
    assert may_reach([], STRANGER, one, 22)
    assert not may_reach([deny], STRANGER, one, 22)
    assert may_reach([deny, {"spec": {**deny["spec"], "ingress": [{}]}}], STRANGER, one, 22)
    block = {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["203.0.113.0/24"]}}
    allowed = {"spec": {"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [block]}]}}
    assert may_reach([allowed], one, "198.51.100.1", 443)
    assert not may_reach([allowed], one, OUTSIDE, 443)


# --- The end of a sweep, and its going on


def test_preemption_leaves_a_sweep_the_time_it_needs(documents):
    for pod in pods(documents):
        if pod.labels.get("ray.io/node-type") == "head":
            container = pod.spec["containers"][0]
            patience = {each["name"]: each.get("value") for each in container["env"]}["SWEEP_STOP_WAIT_S"]
            assert float(patience) + 30 < pod.spec["terminationGracePeriodSeconds"]
            assert "exec start-head " in container["args"][0]
    for job in of_kind(documents, "RayJob"):
        variables = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
        assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
        assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= 120
        assert job["spec"]["backoffLimit"] > 0


def test_nodes_start_what_the_operator_would_have_started(documents, tmp_path):
    """The commands of both kinds of node, with the variable that the operator sets; programs only say their words."""
    for name in ("ray", "start-head"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    for pod in pods(documents):
        head = pod.labels.get("ray.io/node-type") == "head"
        if head or pod.labels.get("ray.io/node-type") == "worker":
            container = pod.spec["containers"][0]
            generated = f"ray start {'--head ' if head else ''} --block  --num-cpus=8 --metrics-export-port=8080"
            environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "KUBERAY_GEN_RAY_START_CMD": generated}
            command = [*container["command"], *container["args"]]
            said = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment)
            begins = "start-head" if head else "ray start"
            assert said.stdout.strip() == f"{begins} --block --num-cpus=8 --metrics-export-port=8080", said.stderr
            # Without either, the operator would put its own command in place of ours.
            assert "ray start" in container["args"][0]
    for document in documents:
        if document["apiVersion"].startswith("ray.io/"):
            assert document["metadata"]["annotations"] == {"ray.io/overwrite-container-cmd": "true"}


@pytest.fixture
def program(tmp_path) -> Path:
    """A `python` that only says how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in = folder / "python"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$PWD" "$@"\nexit "${STATUS:-0}"\n')
    stand_in.chmod(0o755)
    return folder


def run_sweep(program: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{program}:{os.environ['PATH']}", **variables}
    return subprocess.run(
        ["sh", str(SCRIPTS / "run-sweep"), *arguments], capture_output=True, text=True, timeout=30, env=environment
    )


def test_a_job_begins_a_sweep_and_goes_on_where_its_folder_exists(tmp_path, program):
    runs = tmp_path / "runs"
    command = ["-m", "sweep.run", "/spaces/a b.yaml", "--address", "auto", "--name", "depth", "--out", str(runs)]
    command += ["--tracking-uri", "http://mlflow:5000"]
    begun = run_sweep(program, "depth", "/spaces/a b.yaml", "--trials", "8", SWEEP_RUNS=str(runs), STATUS="130")
    assert begun.stdout.splitlines() == ["/", *command, "--trials", "8"]
    assert begun.returncode == 130
    (runs / "depth").mkdir(parents=True)
    again = run_sweep(program, "depth", "/spaces/a b.yaml", "--trials", "8", SWEEP_RUNS=str(runs))
    assert again.stdout.splitlines() == ["/", *command, "--trials", "8", "--resume"]
    wrong = run_sweep(program, "depth")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "expected NAME SPACE.yaml" in wrong.stderr


def test_the_options_of_the_job_are_those_of_the_program(deployments):
    from sweep.run import parser

    text = (SCRIPTS / "run-sweep").read_text()
    known = {name for action in parser()._actions for name in action.option_strings}
    used = set(re.findall(r"(--[a-z-]+)", text.split("exec ", 1)[1])) | {"--resume"}
    assert used
    assert used <= known
    for name in ("overlays/job", "overlays/job-gpu"):
        script, _, space = of_kind(deployments[name], "RayJob")[0]["spec"]["entrypoint"].split()[:3]
        assert script == "/opt/sweep/run-sweep"
        assert (KUBERNETES.parents[1] / "search_spaces" / Path(space).name).exists()


# --- The secrets' command, and the other files


@pytest.fixture
def kubectl(tmp_path) -> Path:
    """A `kubectl` that knows the secrets named in a file, and writes down what it is told to make."""
    folder = tmp_path / "programs"
    folder.mkdir()
    stand_in = folder / "kubectl"
    stand_in.write_text(
        f"""#!/bin/sh
case " $* " in
*" get secret "*) grep -qx "$5" "{folder}/known" 2>/dev/null ;;
*) printf '%s\\n' "$*" >> "{folder}/made" ;;
esac
"""
    )
    stand_in.chmod(0o755)
    return folder


def make_secrets(kubectl: Path, files: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{kubectl}:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", str(KUBERNETES / "make-secrets"), str(files)],
        capture_output=True,
        text=True,
        timeout=30,
        env=environment,
    )


def test_every_secret_that_the_files_name_is_made_of_random_words(documents, kubectl, tmp_path):
    made = make_secrets(kubectl, tmp_path / "secrets")
    assert made.returncode == 0, made.stderr
    lines = [line.split() for line in (kubectl / "made").read_text().splitlines()]
    assert all(line[:5] == ["--namespace", NAMESPACE, "create", "secret", "generic"] for line in lines)
    keys = {line[5]: dict(word.removeprefix("--from-file=").split("=", 1) for word in line[6:]) for line in lines}
    assert set(keys) == set(manifests.secret_keys(documents)) - MADE_BY_OPERATOR
    for files in keys.values():
        for file in files.values():
            text = Path(file).read_text()
            assert re.search("[0-9a-f]{64}", text)
            assert text not in made.stdout + made.stderr
    # The files that containers are told to read are keys of the secret that is mounted there.
    for pod in pods(documents):
        mounted = {
            mount["mountPath"]: volume["secret"]["secretName"]
            for container in pod.spec["containers"]
            for mount in container.get("volumeMounts", ())
            for volume in pod.spec["volumes"]
            if volume["name"] == mount["name"] and "secret" in volume
        }
        for container in pod.spec["containers"]:
            for each in container.get("env", ()):
                if each["name"].endswith("_PASSWORD_FILE"):
                    folder, _, key = each["value"].rpartition("/")
                    assert key in keys[mounted[folder]], each
    assert set(keys["mlflow-client"]) == {"credentials"}
    assert "mlflow_tracking_password = " in Path(keys["mlflow-client"]["credentials"]).read_text()


def test_secrets_that_are_there_are_kept(kubectl, tmp_path):
    (kubectl / "known").write_text("postgres\nmlflow-server\nmlflow-client\n")
    made = make_secrets(kubectl, tmp_path / "secrets")
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("kept     secret") == 3
    assert not (kubectl / "made").exists()


def test_compose_and_kubernetes_run_the_same_images_and_settings(documents):
    """One image, one database, one set of names: what is tested of Compose holds here."""
    compose = yaml.safe_load((KUBERNETES.parent / "compose.yaml").read_text())["services"]
    ours = {pod.labels["app.kubernetes.io/component"]: pod.spec["containers"][0] for pod in pods(documents)}
    assert ours["postgres"]["image"] == compose["postgres"]["image"]
    for name, of_compose in {"ray-head": "head", "mlflow": "mlflow"}.items():
        assert ours[name]["image"] in compose[of_compose]["image"]
    variables = {each["name"]: each["value"] for each in ours["mlflow"]["env"]}
    theirs = compose["mlflow"]["environment"]
    for name in set(variables) - {"MLFLOW_ADMIN_PASSWORD_FILE", "POSTGRES_PASSWORD_FILE"}:
        assert re.sub(r"\$\{[A-Z_]+:-(.*)\}", r"\1", theirs[name]) == variables[name], name
    assert ours["mlflow"]["command"] == compose["mlflow"]["command"]
    assert compose["head"]["command"][0] == "start-head"
    for program in ("start-head", "start-tracking"):
        assert (KUBERNETES.parent / "bin" / program).exists()
