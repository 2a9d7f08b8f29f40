"""Small sweeps of fake trials, for both runners."""

from dataclasses import dataclass, field
from pathlib import Path

from cxr_models.trial import EpochMetrics, Suggestion, TrialConfig, TrialResult
from sweep.halving import Halving, rungs
from sweep.runner import Conductor
from sweep.search import Search
from sweep.spec import read_spec
from tests.programs import work

SPACE = """\
name: fake
data: phantom
objective: macro_f1
search: {{algorithm: grid, trials: {trials}}}
space:
  backbone: vanilla_cnn
  weights: none
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
    folder: Path, program: str, *, trials: int = 6, epochs: int = 3, grace_epochs: int = 0
) -> tuple[Conductor, Heard]:
    """A grid over the seeds 0, 1, 2, ..., and what is heard of it.

    Args:
        folder: for the spec and the trials.
        program: function in `tests.programs`.
        trials: how many.
        epochs: of each trial.
        grace_epochs: of halving by 2; 0 for none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fake.yaml"
    path.write_text(SPACE.format(trials=trials, seeds=list(range(trials)), epochs=epochs))
    heard = Heard()
    halving = Halving(rungs(grace_epochs, 2, epochs), 2, "max") if grace_epochs else None
    search = Search(read_spec(path))
    return Conductor(work(folder / "trials", program), search, halving, parameters, [heard]), heard


def parameters(config: TrialConfig) -> tuple[int, int]:
    return 10 + config.seed, 100
