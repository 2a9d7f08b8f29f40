"""Small sweeps of fake trials, for both runners."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cxr_models.trial import EpochMetrics, Suggestion, TrialConfig, TrialResult
from sweep.halving import Halving, Rungs
from sweep.runner import Conductor, Retried
from sweep.search import Search
from sweep.spec import read_spec
from sweep.worker import Work
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
  batch_size: {batch_sizes}
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
    batch_sizes: Sequence[int] = (),
    seeds: int = 0,
    journal: Path | None = None,
    stages: Sequence[int] = (),
    resumed: bool = False,
    retried: Retried = lambda trial_id, end, epochs: None,
    pixels: Path | None = None,
) -> tuple[Conductor, Heard]:
    """A sweep over the seeds 0, 1, 2, ..., and what is heard of it.

    Args:
        folder: for the spec and the trials.
        program: function in `tests.programs`, or `module:function`.
        trials: how many.
        epochs: of each trial.
        rungs: epochs after which the weaker half ends; none if empty.
        heard: listens, in place of a new one.
        algorithm: a grid runs every seed once, in order.
        freeze: strategy of every trial.
        head_parameters: of a configuration; each has about 110 in all, see `parameters`.
        batch_sizes: of each trial; 8 if empty.
        seeds: how many there are to choose from; as many as trials if 0.
        journal: of the search; the rungs are kept beside it.
        stages: of the search.
        resumed: of the search.
        retried: hears of trials that go on after they were lost.
        pixels: the images of every trial.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fake.yaml"
    of_seeds = [{"if": {"seed": seed}, "value": size} for seed, size in enumerate(batch_sizes)]
    sizes = json.dumps({"choices": [8], "when": of_seeds} if of_seeds else 8)
    facts = {"algorithm": algorithm, "trials": trials, "seeds": list(range(seeds or trials))}
    path.write_text(SPACE.format(**facts, epochs=epochs, freeze=freeze, batch_sizes=sizes))
    heard = heard or Heard()
    kept = journal.with_name("halving.jsonl") if journal else None
    halving = Halving(Rungs(rungs, epoch_images=1), 2, "max", journal=kept) if rungs else None
    search = Search(read_spec(path), journal, stages=stages, resumed=resumed)
    conductor = Conductor(
        _work(folder / "trials", program, pixels),
        search,
        halving,
        parameters,
        [heard],
        head_parameters=head_parameters,
        retried=retried,
    )
    return conductor, heard


def _work(folder: Path, program: str, pixels: Path | None) -> Work:
    found = work(folder, program)
    side = TrialConfig("vanilla_cnn").image_side
    data = replace(found.data, pixels={side: pixels}) if pixels else found.data
    return replace(found, data=data, program=program if ":" in program else found.program)


def parameters(config: TrialConfig, phase: int) -> tuple[int, int]:
    return 10 + config.seed + phase, 100
