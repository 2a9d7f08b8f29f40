"""Small sweeps of fake trials, for both runners."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cxr_models.trial import EpochMetrics, Suggestion, TrialConfig, TrialResult
from sweep.halving import Halving, Rungs
from sweep.runner import Conductor
from sweep.search import Search
from sweep.spec import read_spec
from tests.programs import work

SPACE = """\
name: fake
data: phantom
objective: macro_f1
search: {{algorithm: {algorithm}, trials: {trials}}}
space:
  backbone: vanilla_cnn
  weights: none
  freeze: "{freeze}"
  seed: {seeds}
  epochs: {epochs}
"""


@dataclass
class Heard:
    """A listener that keeps what it hears."""

    begun: list[Suggestion] = field(default_factory=list)
    epochs: list[EpochMetrics] = field(default_factory=list)
    results: dict[int, TrialResult] = field(default_factory=dict)
    order: list[tuple[str, str, int]] = field(default_factory=list)

    def started(self, suggestion: Suggestion) -> None:
        self.begun.append(suggestion)
        self.order.append(("started", suggestion.trial_id, 0))

    def epoch(self, metrics: EpochMetrics) -> None:
        self.epochs.append(metrics)
        self.order.append(("epoch", metrics.trial_id, metrics.epoch))

    def ended(self, number: int, result: TrialResult) -> None:
        self.results[number] = result
        self.order.append(("ended", result.trial_id, result.epochs))

    @property
    def by_seed(self) -> dict[int, TrialResult]:
        return {result.config.seed: result for result in self.results.values()}


def fake_sweep(
    folder: Path,
    program: str,
    *,
    trials: int = 6,
    epochs: int = 3,
    rungs: tuple[int, ...] = (),
    heard: Heard | None = None,
    algorithm: str = "grid",
    freeze: str = "all",
    head_parameters: Callable[[TrialConfig], int] = lambda config: 0,
) -> tuple[Conductor, Heard]:
    """A sweep over the seeds 0, 1, 2, ..., and what is heard of it.

    Args:
        folder: for the spec and the trials.
        program: function in `tests.programs`.
        trials: how many.
        epochs: of each trial.
        rungs: epochs after which the weaker half ends; none if empty.
        heard: listens, in place of a new one.
        algorithm: a grid runs every seed once, in order.
        freeze: strategy of every trial.
        head_parameters: of a configuration; each has about 110 in all, see `parameters`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fake.yaml"
    path.write_text(
        SPACE.format(algorithm=algorithm, trials=trials, seeds=list(range(trials)), epochs=epochs, freeze=freeze)
    )
    heard = heard or Heard()
    halving = Halving(Rungs(rungs, epoch_images=1), 2, "max") if rungs else None
    search = Search(read_spec(path))
    jobs = work(folder / "trials", program)
    return Conductor(jobs, search, halving, parameters, [heard], head_parameters=head_parameters), heard


def parameters(config: TrialConfig, phase: int) -> tuple[int, int]:
    return 10 + config.seed + phase, 100
