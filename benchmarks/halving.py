"""Does halving find the best freeze strategy, and what does it cost? A simulation on measured learning curves.

Every simulated sweep draws trials of five strategies (`learning_curves.py`) and runs the same trials, with the same
noise, several at a time, in each of these ways: every trial to its end; as many trials to their end as fair halving
pays epochs for; ASHA, where all trials meet at the rungs; and fair halving, where each strategy is among its own. ASHA
is the product's own class, to which all trials are shown as ones of a single strategy.

Run:  python benchmarks/halving.py
Cost: about a minute on one CPU core. The measured curves it draws from: `learning_curves.yaml`.
"""

import argparse
import heapq
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from learning_curves import HEAD, Floats, Strategy, read_curves, read_measured
from measuring import environment, own_command, write_result
from rendering import render_one

from cxr_models.trial import TrialConfig
from sweep.halving import Halving, Rungs, head_epochs

RESULTS = Path(__file__).parent / "results"
CURVES = RESULTS / "learning_curves.json"

EPOCHS, GRACE_EPOCHS, REDUCTION_FACTOR = 27, 4, 3
AT_ONCE = 4
# Which strategy ends best differs from one data set to the next: the standard deviation, between sweeps, of where the
# trials of a strategy end on average. An assumption: about half of what lies between the strategies that were measured.
BETWEEN = 0.02
# The seconds of an epoch differ that much from trial to trial, by a factor: what shares the machine is never the same.
PACE = 1.15


@dataclass(frozen=True)
class Scenario:
    """A kind of sweep.

    Attributes:
        trials: of each strategy.
        slower: factor on the time constants of all strategies but the head alone.
        ends: `measured`, `reversed` (the strategy that ended worst ends best, and so on) or `alike` (every strategy
            learns and ends alike).
    """

    name: str
    trials: int = 8
    slower: float = 1.0
    ends: str = "measured"

    def strategies(self, measured: Mapping[str, Strategy]) -> list[Strategy]:
        """The strategies of its sweeps."""
        rows = sorted(measured.values(), key=lambda row: row.end)
        if self.ends == "alike":
            rows = [replace(measured[HEAD], freeze=row.freeze, seconds=row.seconds) for row in rows]
        if self.ends == "reversed":
            rows = [row.ending_at(other.end) for row, other in zip(rows, reversed(rows), strict=True)]
        return [row if row.freeze == HEAD else row.slower(self.slower) for row in rows]


SCENARIOS = (
    Scenario("as measured"),
    Scenario("what trains the backbone learns 2 times slower", slower=2.0),
    Scenario("4 times slower", slower=4.0),
    Scenario("4 times slower, 3 trials of each strategy", trials=3, slower=4.0),
    Scenario("4 times slower, 24 trials of each strategy", trials=24, slower=4.0),
    Scenario("the order of the ends reversed", ends="reversed"),
    Scenario("all strategies learn alike", ends="alike"),
)


@dataclass(frozen=True)
class Trial:
    """A trial that only has to be played.

    Attributes:
        true: (epochs,) score after each epoch, free of noise.
        measured: (epochs,) the same as validation shows it.
        seconds: (epochs,) of each.
    """

    trial_id: str
    config: TrialConfig
    true: Floats
    measured: Floats
    seconds: Floats


@dataclass(frozen=True)
class Outcome:
    """What a way of running a sweep came to.

    Attributes:
        spared: whether the trial that truly ends highest ran to its end.
        found: whether the trial with the best measured epoch is of that trial's strategy.
        regret: how far the true score of that trial, at its best epoch, lies below that of the best trial at its end.
        epochs: that were run, of all.
        seconds: of training, of all.
    """

    spared: bool
    found: bool
    regret: float
    epochs: float
    seconds: float


def draw_trials(strategies: Sequence[Strategy], each: int, generator: np.random.Generator) -> list[Trial]:
    """The trials of a sweep in the order they are given out: `each` of every strategy, in random order."""
    own = [strategy.ending_at(strategy.end + generator.normal(0.0, BETWEEN)) for strategy in strategies]
    (head,) = (strategy for strategy in own if strategy.freeze == HEAD)
    trials = []
    for number, place in enumerate(generator.permutation(each * len(own))):
        strategy = own[place % len(own)]
        config = TrialConfig("simulated", freeze=strategy.freeze, epochs=EPOCHS)
        alone = head_epochs(config)
        true = np.concatenate([head.draw(generator, alone), strategy.draw(generator, EPOCHS - alone)])
        noise = generator.normal(0.0, strategy.noise, EPOCHS)
        seconds = np.full(EPOCHS, strategy.seconds)
        seconds[:alone] = head.seconds
        pace = np.exp(generator.normal(0.0, np.log(PACE)))
        trials.append(Trial(f"t{number}", config, true, np.clip(true + noise, 0.0, 1.0), seconds * pace))
    return trials


def play(
    trials: Sequence[Trial], halving: Halving | None, seen: Callable[[TrialConfig], TrialConfig] = lambda config: config
) -> dict[str, int]:
    """Run trials `AT_ONCE` at a time; each tells its rungs when its clock gets there.

    Args:
        trials: in the order they are given out.
        halving: ends weak ones; None none.
        seen: what halving is told of a configuration.

    Returns:
        Trial -> the epochs it ran.
    """
    waiting, running, ran = deque(enumerate(trials)), [], {}

    def advance(now: float, number: int, epoch: int) -> None:
        trial = trials[number]
        rungs = halving.decisions(seen(trial.config)) if halving else ()
        stop = min((rung for rung in rungs if rung > epoch), default=EPOCHS)
        heapq.heappush(running, (now + trial.seconds[epoch:stop].sum(), number, stop))

    while waiting and len(running) < AT_ONCE:
        advance(0.0, waiting.popleft()[0], 0)
    while running:
        now, number, epoch = heapq.heappop(running)
        trial = trials[number]
        ran[trial.trial_id] = epoch
        last = epoch == EPOCHS or halving is None
        if not last and halving.keep(trial.trial_id, seen(trial.config), epoch, trial.measured[epoch - 1]):
            advance(now, number, epoch)
        elif waiting:
            advance(now, waiting.popleft()[0], 0)
    return ran


def as_one_strategy(config: TrialConfig) -> TrialConfig:
    """What ASHA over all strategies is told: they do not differ, and every epoch counts."""
    return replace(config, freeze="none")


def afford(trials: Sequence[Trial], epochs: int) -> dict[str, int]:
    """As many trials to their end as so many epochs pay for, in the order they are given out; at least one."""
    return {trial.trial_id: EPOCHS for trial in trials[: max(1, epochs // EPOCHS)]}


def judge(trials: Sequence[Trial], ran: Mapping[str, int]) -> Outcome:
    """What came of trials that ran so many epochs; they are ranked by their best epoch, as the product ranks."""
    best = max(trials, key=lambda trial: trial.true[-1])
    begun = [trial for trial in trials if trial.trial_id in ran]
    chosen = max(begun, key=lambda trial: trial.measured[: ran[trial.trial_id]].max())
    epoch = int(chosen.measured[: ran[chosen.trial_id]].argmax())
    seconds = sum(trial.seconds[: ran[trial.trial_id]].sum() for trial in begun)
    return Outcome(
        spared=ran.get(best.trial_id) == EPOCHS,
        found=chosen.config.freeze == best.config.freeze,
        regret=float(best.true[-1] - chosen.true[epoch]),
        epochs=sum(ran.values()) / (EPOCHS * len(trials)),
        seconds=float(seconds / sum(trial.seconds.sum() for trial in trials)),
    )


def compare(trials: Sequence[Trial]) -> dict[str, Outcome]:
    """The same trials in every way."""
    rungs = Rungs.spaced(GRACE_EPOCHS, REDUCTION_FACTOR, EPOCHS, epoch_images=1)

    def halving(least_survivors: int = 1) -> Halving:
        return Halving(rungs, REDUCTION_FACTOR, "max", least_survivors=least_survivors)

    fair = play(trials, halving())
    ways = {
        "every trial to its end": play(trials, None),
        "fewer trials to their end": afford(trials, sum(fair.values())),
        "ASHA over all strategies": play(trials, halving(), as_one_strategy),
        "fair halving": fair,
        "fair halving, least_survivors 2": play(trials, halving(2)),
    }
    return {way: judge(trials, ran) for way, ran in ways.items()}


def simulate(scenario: Scenario, measured: Mapping[str, Strategy], sweeps: int, seed: int) -> list[dict[str, Any]]:
    """A row a way of running: means over so many sweeps.

    Returns:
        `way`; `spared` and `found`, shares of the sweeps; `regret`, and `regret_error`, its standard error; `epochs`
        and `seconds`, shares of what running every trial to its end takes.
    """
    strategies = scenario.strategies(measured)
    outcomes = [
        compare(draw_trials(strategies, scenario.trials, np.random.default_rng((seed, sweep))))
        for sweep in range(sweeps)
    ]
    rows = []
    for way in outcomes[0]:
        own = [outcome[way] for outcome in outcomes]
        means = {name: float(np.mean([getattr(one, name) for one in own])) for name in asdict(own[0])}
        error = float(np.std([one.regret for one in own]) / np.sqrt(sweeps))
        rows.append({"way": way, **means, "regret_error": error})
    return rows


def main() -> None:
    """The command."""
    arguments = parser().parse_args()
    if arguments.curves:
        write_result({"space": "benchmarks/learning_curves.yaml", "trials": read_curves(arguments.curves)}, CURVES)
    measured = read_measured(CURVES)
    result = {
        "kind": "halving",
        "environment": environment(own_command()),
        "sweeps": arguments.sweeps,
        "seed": arguments.seed,
        "epochs": EPOCHS,
        "rungs": [GRACE_EPOCHS, GRACE_EPOCHS * REDUCTION_FACTOR],
        "reduction_factor": REDUCTION_FACTOR,
        "at_once": AT_ONCE,
        "between": BETWEEN,
        "strategies": [asdict(strategy) for strategy in SCENARIOS[0].strategies(measured)],
        "scenarios": [
            {**asdict(scenario), "rows": simulate(scenario, measured, arguments.sweeps, arguments.seed)}
            for scenario in SCENARIOS
        ],
    }
    write_result(result, arguments.out / "halving.json")
    print(render_one(json.loads(json.dumps(result))))


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    found = argparse.ArgumentParser(description="Halving against ASHA over all strategies and against none, simulated.")
    found.add_argument("--sweeps", type=int, default=400, metavar="N", help="of each scenario (400)")
    found.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    found.add_argument("--curves", type=Path, metavar="RUN", help="take the measured curves anew from this run folder")
    found.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="(benchmarks/results)")
    return found


if __name__ == "__main__":
    main()
