"""The worker that Ray runs: warm, it takes one trial after another, which a child process trains."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune

from cxr_models.trial import TrialConfig
from sweep.depot import Home
from sweep.node_files import NodeFiles
from sweep.ray_depot import AskingRay
from sweep.versions import version_of
from sweep.worker import Fault, TrialEnd, TrialJob, TrialProcess, Work, failure

# What a training's figures follow from.
PACKAGES = ("cxr-sweep", "tensorflow", "keras", "numpy")


def versions_here() -> dict[str, str]:
    """Library -> its version on this machine."""
    return {name: version_of(name) for name in PACKAGES}


@dataclass(frozen=True)
class FilesOfNodes:
    """What a worker makes its `NodeFiles` of, wherever it is.

    Attributes:
        versions: of the driver's machine, as `versions_here`; with others, figures would be others too.
    """

    home: Home
    ask: AskingRay
    versions: Mapping[str, str] = field(default_factory=versions_here)

    def check_versions(self) -> None:
        """Whether this machine has the driver's.

        Raises:
            RuntimeError: it has not.
        """
        here = versions_here()
        others = [f"{name} {here[name]} in place of {own}" for name, own in self.versions.items() if here[name] != own]
        if others:
            raise RuntimeError(f"this node has {', '.join(others)}: install there what the sweep's own machine has")


class RayTrial(tune.Trainable):  # type: ignore[misc]
    """A warm worker: Ray hands it one trial after another, a child process trains them."""

    def setup(self, config: dict[str, Any], work: Work, logs: Path, files: FilesOfNodes | None) -> None:
        if not ray.get_gpu_ids():
            # Ray leaves a CPU trial the sight of every GPU, and TensorFlow would take them.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        self._of_nodes, self._files = files, NodeFiles(files.home, files.ask) if files else None
        if self._files:
            logs = self._files.moved(logs)
        self._process = TrialProcess(logs / f"worker-{os.getpid()}.log", work.preload)
        self._work = work  # with the driver's paths
        self._trial_id = ""
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._start(new_config)
        return True

    def _start(self, config: dict[str, Any]) -> None:
        trial = TrialConfig.from_json(json.loads(config["config"]))
        decisions, again = frozenset(json.loads(config["decisions"])), tuple(json.loads(config["again"]))
        known, alone = config["known"], config["alone"]
        self._leave_last()
        self._trial_id, self._not_ready, work = config["trial_id"], None, self._work
        if self._files and self._of_nodes:
            try:
                self._of_nodes.check_versions()
                work = self._files.work(self._work)
                self._files.ready(self._work, self._trial_id, trial)
            except Exception as error:  # on another node it may well begin
                self._not_ready = replace(failure(error), fault=Fault.LOST)
                return
        self._process.start(TrialJob(self._trial_id, trial, work, decisions, again, known, alone))

    def step(self) -> dict[str, Any]:
        events = [self._not_ready] if self._not_ready else self._process.next()
        if self._files:
            events = self._brought_home(self._files, events)
        return {"events": events, "done": isinstance(events[-1], TrialEnd)}

    def _brought_home(self, files: NodeFiles, events: list[Any]) -> list[Any]:
        """The news, once what they tell of is home."""
        *epochs, last = events
        if isinstance(last, TrialEnd) and last.error and files.places:
            # The disk that is full is this node's: others have theirs.
            fault = Fault.LOST if last.fault is Fault.NO_SPACE else last.fault
            last = replace(last, error=f"{last.error} (on {socket.gethostname()})", fault=fault)
        if not self._not_ready:
            try:
                files.bring_home(self._trial_id)
            except Exception as error:  # so nobody hears of these epochs: they are trained again
                self._process.stop()
                end = failure(error)
                return [replace(end, fault=end.fault or Fault.LOST)]
        return [*epochs, last]

    def _leave_last(self) -> None:
        """End the trial before, if it runs, and leave nothing of it on a node that is not home."""
        self._process.stop()
        if self._files and self._trial_id:
            self._files.forget(self._trial_id)

    def cleanup(self) -> None:
        self._process.close()
        if self._files and self._trial_id:
            self._files.forget(self._trial_id)
