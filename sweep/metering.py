"""What Prometheus is told of a sweep on a cluster: the names, and the figures of the moment."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cxr_models.trial import PIXELS, EpochMetrics, Objective, Outcome, Suggestion, TrialResult
from sweep.nodes import SlotFigures
from sweep.record import Past

Reading = tuple[str, str]  # name of a metric, and the value of its own label or ""


@dataclass(frozen=True)
class Metric:
    """One that Prometheus reads, beside the label `sweep`.

    Attributes:
        name: with the ending that its kind and unit have by Prometheus' conventions; Ray puts `ray_` in front.
        kind: a counter only grows, from 0 in each process of the driver.
        meaning: for people.
        label: what its values are told apart by; "" where there is one.
    """

    name: str
    kind: Literal["counter", "gauge"]
    meaning: str
    label: str = ""


METRICS = (
    Metric("cxr_sweep_trials_total", "counter", "trials that ended", "outcome"),
    Metric("cxr_sweep_epochs_total", "counter", "epochs of trials, by what they read of each image", "source"),
    Metric("cxr_sweep_epoch_seconds_total", "counter", "seconds of training and validation in these epochs"),
    Metric("cxr_sweep_feature_requests_total", "counter", "times a trial asked for stored features", "result"),
    Metric("cxr_sweep_feature_seconds_total", "counter", "seconds spent computing features or waiting for them"),
    Metric("cxr_sweep_running_trials", "gauge", "trials that are handed out and have not ended"),
    Metric("cxr_sweep_waiting_trials", "gauge", "trials that are still to be handed out"),
    Metric("cxr_sweep_slots", "gauge", "trials that can run at once on the nodes of the moment"),
    Metric("cxr_sweep_busy_slots", "gauge", "slots that a trial or a final training has"),
    Metric("cxr_sweep_nodes", "gauge", "nodes that have slots"),
    Metric("cxr_sweep_best_value", "gauge", "best validation figure so far of the sweep's objective", "metric"),
    Metric("cxr_sweep_left_seconds", "gauge", "seconds until the last trial ends, by the pace so far"),
    Metric("cxr_sweep_mlflow_lacking_epochs", "gauge", "epochs on record that MLflow does not have"),
)


class Meter:
    """Listens to a sweep, and reads what is told of it.

    Only `readings` may be called from another thread.

    Args:
        objective: of the sweep.
        past: what earlier sessions did; it does not count again, but the best value and MLflow's backlog are of all.
        trials: how many there will be.
        running: gives how many are handed out.
        left_s: gives the seconds until the last one ends, 0 where that is not known.
        lacking: trial -> how many epochs it has, to how many of them MLflow does not have.
    """

    def __init__(
        self,
        objective: Objective,
        past: Past,
        *,
        trials: int,
        running: Callable[[], int],
        left_s: Callable[[], float],
        lacking: Callable[[Mapping[str, int]], int],
    ) -> None:
        self._objective = objective
        self._trials = trials
        self._running = running
        self._left_s = left_s
        self._lacking = lacking
        self._counts: defaultdict[Reading, float] = defaultdict(float)
        self._epochs = {trial_id: epochs[-1].epoch for trial_id, epochs in past.epochs.items() if epochs}
        self._best = objective.worst
        self._ended = len(past.ended)
        self._note_best(result for _, result in past.ended)

    def started(self, suggestion: Suggestion) -> None:
        pass  # a trial whose worker was lost waits again: whoever conducts knows what runs

    def epoch(self, metrics: EpochMetrics) -> None:
        self._epochs[metrics.trial_id] = metrics.epoch
        source = "pixels" if metrics.source.startswith(PIXELS) else "features"
        self._count("cxr_sweep_epochs_total", 1, source)
        self._count("cxr_sweep_epoch_seconds_total", metrics.seconds)
        self._count("cxr_sweep_feature_requests_total", metrics.features_found, "hit")
        self._count("cxr_sweep_feature_requests_total", metrics.features_missed, "miss")
        self._count("cxr_sweep_feature_seconds_total", metrics.features_seconds)

    def ended(self, number: int, result: TrialResult) -> None:
        self._ended += 1
        self._count("cxr_sweep_trials_total", 1, str(result.outcome))
        self._note_best([result])

    def readings(self, slots: SlotFigures) -> dict[Reading, float]:
        """What is known at this moment; a counter that nothing has come to is absent.

        Args:
            slots: of the cluster.
        """
        counts, running = dict(self._counts), self._running()
        gauges: dict[Reading, float | None] = {
            ("cxr_sweep_running_trials", ""): running,
            ("cxr_sweep_waiting_trials", ""): max(0, self._trials - self._ended - running),
            ("cxr_sweep_slots", ""): slots.slots,
            ("cxr_sweep_busy_slots", ""): slots.busy,
            ("cxr_sweep_nodes", ""): slots.nodes,
            ("cxr_sweep_best_value", self._objective.metric): self._best if math.isfinite(self._best) else None,
            ("cxr_sweep_left_seconds", ""): self._left_s() or None,
            ("cxr_sweep_mlflow_lacking_epochs", ""): self._lacking(dict(self._epochs)),
        }
        return counts | {reading: value for reading, value in gauges.items() if value is not None}

    def _count(self, name: str, amount: float, label: str = "") -> None:
        if amount:
            self._counts[name, label] += amount

    def _note_best(self, results: Iterable[TrialResult]) -> None:
        for result in results:
            value = result.val.get(self._objective.metric)
            if value is not None and result.outcome is not Outcome.FAILED and self._objective.better(value, self._best):
                self._best = value
