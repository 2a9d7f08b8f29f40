"""Hands a sweep's figures to the Prometheus exporter of the Ray cluster that the driver is connected to."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray.util.metrics import Counter, Gauge

from sweep.metering import METRICS, Meter, Metric, Reading
from sweep.nodes import SlotFigures

INTERVAL_S = 5.0  # Ray itself passes them on every ten seconds


@contextmanager
def exported(meter: Meter, sweep: str, slots: Callable[[], SlotFigures], told: Callable[[str], None]) -> Iterator[None]:
    """Within the block Ray has the readings of a meter, a few seconds old.

    Nothing that goes wrong here reaches the sweep; it is told once, and nothing more is exported.

    Args:
        meter: of the sweep.
        sweep: its name, the label of all that is told.
        slots: gives those of the cluster, in another thread.
        told: gets a line where the export fails.
    """
    ended = threading.Event()

    def export() -> None:
        try:
            exporter = _Exporter(meter, sweep, slots)
            while not ended.wait(INTERVAL_S):
                exporter.export()
            exporter.export()
        except Exception as error:
            told(f"Prometheus is told nothing more of this sweep: {type(error).__name__}: {error}")

    thread = threading.Thread(target=export, name="prometheus", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(INTERVAL_S)


class _Exporter:
    def __init__(self, meter: Meter, sweep: str, slots: Callable[[], SlotFigures]) -> None:
        self._meter = meter
        self._slots = slots
        self._sweep = sweep
        self._counted: dict[Reading, float] = {}
        self._labels = {metric.name: metric.label for metric in METRICS}
        self._counters, self._gauges = (
            {each.name: make(each.name, each.meaning, _tag_keys(each)) for each in METRICS if each.kind == kind}
            for kind, make in (("counter", Counter), ("gauge", Gauge))
        )

    def export(self) -> None:
        """Tell Ray the readings of the moment; of counters what they grew by."""
        for reading, value in self._meter.readings(self._slots()).items():
            name, label = reading
            tags = {"sweep": self._sweep, **({self._labels[name]: label} if label else {})}
            if name in self._gauges:
                self._gauges[name].set(value, tags)
            elif value > (before := self._counted.get(reading, 0.0)):
                self._counters[name].inc(value - before, tags)
                self._counted[reading] = value


def _tag_keys(metric: Metric) -> tuple[str, ...]:
    return ("sweep", metric.label) if metric.label else ("sweep",)
