"""Results as Markdown."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from cluster_tables import cluster_page
from comparing import mean_accuracies, mean_pause, own_trials, strategy_seconds
from fault_tables import FAULTS
from mixes import Mix
from tables import table

Result = Mapping[str, Any]

MIB = 1024**2
NOT_MEASURED = "not measured"
LABELS = {
    "ray": "Ray Tune + Keras",
    "keras-tuner": "KerasTuner",
    "optuna": "Optuna loop",
    "strong": "strong (images in memory, warm processes)",
}
ORDER = (
    "sweep_speed",
    "cut_gains",
    "compiled_steps",
    "audit_speed",
    "pixel_reader",
    "many_trials",
    "halving",
    "darkcovidnet",
    "fuzz_inputs",
    *FAULTS,
    "cluster",
)
PREFACE = """\
# Measured

**What is compared.** The same trials on the same images for the same epochs, without pruning, in this product \
(`cxr-sweep`) and in four programs written as their own documentation shows (`benchmarks/baselines/`): Ray Tune with \
a Keras function, KerasTuner, an Optuna loop, and a *strong* one, which keeps the decoded images in memory and its \
processes warm. Ray Tune and the strong one run a trial on each core with one thread; KerasTuner and Optuna run one \
trial at a time with all cores.

**Cold start.** Every program starts as a fresh process; the product starts with an empty cache too, so decoding, \
computing features, imports, Ray and MLflow all count. Image files are in the page cache for all of them. The product \
also evaluates the best model on the test images, registers it and writes its report; the baselines do not.

**Scaling.** The product runs every mix in full. Each baseline runs once for all mixes of a command, on some trials \
of each freeze strategy (as many of one batch size as of the other) for some of their epochs; the tables say how many. \
A trial's other epochs are taken to last as long as the mean of those measured without the first, which compiles; a \
strategy's other trials as long as the mean of those measured. The mean pause between trials is added, start-up and \
exit count once as measured, and the idle end of the last trials is left out, in the baseline's favour.

**GPU figures are not measured.** All figures are from CPUs.

**To run it** on a quiet machine (the exact commands stand below each result):

```sh
pip install -e '.[benchmark]'
python benchmarks/measure_rates.py --data DIR --weights FILE --out rates.json   # for the speed of light
python benchmarks/sweep_speed.py --data DIR --weights FILE --rates rates.json --baseline-trials 2 --baseline-epochs 3
python benchmarks/cut_gains.py --data DIR --weights FILE --out benchmarks/results
python benchmarks/compiled_steps.py --data DIR --weights FILE --out benchmarks/results
python benchmarks/audit_speed.py
python benchmarks/pixel_reader.py --data DIR
python benchmarks/many_trials.py
python benchmarks/halving.py   # a simulation; needs no data
python benchmarks/darkcovidnet.py --data DIR --weights FILE   # the images of DarkCovidNet
python benchmarks/fuzz_inputs.py   # broken search spaces, images and tables; needs no data
python benchmarks/faults.py drivers   # then workers, mlflow and disk; needs no data
python benchmarks/cluster.py   # one host and three; as root, needs no data
python benchmarks/sweep_speed.py --render benchmarks/results > benchmarks/RESULTS.md
```
"""


def read_results(folder: Path) -> list[Result]:
    """The results in a folder; other JSON files there, such as rates, are not results."""
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return [result for result in found if result.get("kind") in ORDER]


def render(results: Iterable[Result]) -> str:
    """All results as one page, sweeps first."""
    ordered = sorted(results, key=lambda result: (ORDER.index(result["kind"]), _size(result)))
    return "\n\n".join([PREFACE.rstrip(), *map(render_one, ordered)]) + "\n"


def render_one(result: Result) -> str:
    """One result: a heading, its tables, and the machine, versions and command behind it."""
    kinds: Mapping[str, Callable[[Result], list[str]]] = {
        "sweep_speed": _sweep_speed,
        "cut_gains": _cut_gains,
        "compiled_steps": _compiled_steps,
        "audit_speed": _audit_speed,
        "pixel_reader": _pixel_reader,
        "many_trials": _many_trials,
        "halving": _halving,
        "darkcovidnet": _darkcovidnet,
        "fuzz_inputs": _fuzz_inputs,
        **FAULTS,
        "cluster": cluster_page,
    }
    return "\n\n".join([*kinds[result["kind"]](result), _environment(result["environment"])])


def _size(result: Result) -> int:
    """Sweeps of few trained layers first."""
    return max((trial["trainable_parameters"] for trial in result.get("product", {}).get("trials", ())), default=0)


def _mix(result: Result) -> Mix:
    mix = result["mix"]
    return Mix(mix["name"], mix["counts"], mix["epochs"])


def _sweep_speed(result: Result) -> list[str]:
    mix = _mix(result)
    strategies = ", ".join(f"{count} `{freeze}`" for freeze, count in mix.counts.items())
    images = f"{result['images']['train']} training and {result['images']['val']} validation images"
    return [
        f"## Mix `{mix.name}`: {strategies}; {mix.epochs} epochs each, {result['side']} px",
        f"{images}, weights `{result['weights']}`.",
        *_programs(result, mix),
        *_trial_seconds(result, mix),
        *_product_seconds(result["product"]),
        *_memory(result),
    ]


def _programs(result: Result, mix: Mix) -> list[str]:
    """Seconds and ratios of every program, and what was scaled."""
    product = result["product"]
    every = [f"{mix.trials} of {mix.trials}", f"{mix.epochs} of {mix.epochs}"]
    rows = [["cxr-sweep", *every, _seconds(product["wall_seconds"])]]
    rows[0] += [_seconds(product["seconds"].get("startup")), "1", "1", "-", "-", "-"]
    for name, baseline in result["baselines"].items():
        whole = _seconds(baseline["whole_seconds"]) + (" (scaled)" if baseline["scaled"] else "")
        rows.append([LABELS[name], *_run_of(baseline, mix), whole, _seconds(baseline["startup_seconds"])])
        rows[-1] += [_ratio(baseline["ratios"]["cold"]), _ratio(baseline["ratios"]["warm"])]
        rows[-1] += [*_accuracies(baseline, mix, product), "yes" if baseline["same_parameters"] else "NO"]
    header = ["program", "trials run", "epochs run of each", "seconds, cold", "of them start-up", "ratio, cold"]
    header += ["ratio without start-up", "val accuracy", "cxr-sweep's, same trials and epochs"]
    header += ["same trainable parameters"]
    return [table(header, rows), *_scaling_note(result)]


def _run_of(baseline: Result, mix: Mix) -> list[str]:
    own = own_trials(baseline, mix)
    epochs = sorted({len(trial["epoch_seconds"]) for trial in own})
    return [f"{len(own)} of {mix.trials}", f"{' or '.join(map(str, epochs))} of {mix.epochs}"]


def _accuracies(baseline: Result, mix: Mix, product: Result) -> list[str]:
    found = mean_accuracies(baseline, mix, product)
    return [f"{value:.3f}" for value in found] if found else ["-", "-"]


def _scaling_note(result: Result) -> list[str]:
    scaled = [LABELS[name] for name, baseline in result["baselines"].items() if baseline["scaled"]]
    if not scaled:
        return []
    return [
        f"Scaled: {', '.join(scaled)}. Their seconds come from the trials and epochs in columns two and three, the "
        "missing ones taken as the mean of those that ran (see the top), with every strategy's trials weighed by their "
        "number in this mix. Accuracies are of those trials that were taken from this mix, after the epochs that ran."
    ]


def _trial_seconds(result: Result, mix: Mix) -> list[str]:
    """What the scaling rests on: mean seconds of a trial of each strategy."""
    product = result["product"]
    own = [mean(trial["seconds"] for trial in product["trials"] if trial["freeze"] == freeze) for freeze in mix.counts]
    rows = [["cxr-sweep", str(product["at_once"]), *map(_seconds, own), "-"]]
    for name, baseline in result["baselines"].items():
        at_once, trials = baseline["at_once"], baseline["trials"]
        seconds = [_seconds(strategy_seconds(trials, freeze, mix.epochs)) for freeze in mix.counts]
        pause = _seconds(mean_pause(trials, at_once)) if len(trials) > at_once else NOT_MEASURED
        rows.append([LABELS[name], str(at_once), *seconds, pause])
    header = [
        "seconds of one trial, mean",
        "trials at once",
        *(f"`{freeze}`" for freeze in mix.counts),
        "pause between",
    ]
    return [table(header, rows)]


def _product_seconds(product: Result) -> list[str]:
    names = {
        "total": "sweep",
        "startup": "start-up",
        "trials": "trials: first one's start to last epoch",
        "features": "features, summed over workers",
        "evaluate": "test set and model",
    }
    light = product["speed_of_light"]
    rows = [[_seconds(product["seconds"].get(name)) for name in names]]
    rows[0] += [_seconds(light["seconds"] if light else None), _fraction(light["fraction"] if light else None)]
    header = [f"cxr-sweep's seconds: {names['total']}", *list(names.values())[1:], "least possible", "speed of light"]
    note = (
        "When the first trial starts, no features are there yet, so the seconds of the trials hold the computing of "
        "features; the trials end at most so many seconds after the features are ready. Speed of light: the least "
        "possible seconds over those of the trials."
    )
    return [table(header, rows), f"{note} {_rates(light['rates'])}" if light else note]


def _rates(rates: Result) -> str:
    epochs = ", ".join(f"`{freeze}` {seconds:.3g}" for freeze, seconds in rates["suffix_epoch_seconds"].items())
    return (
        f"Measured at best: {rates['extraction_rate']:,.0f} images a second through the frozen layers on all cores; "
        f"seconds of an epoch behind the cut on one core: {epochs}."
    )


def _memory(result: Result) -> list[str]:
    programs = {"cxr-sweep": result["product"], **{LABELS[name]: own for name, own in result["baselines"].items()}}
    rows = [
        [name, kind, _mib(peak["largest"]), _mib(peak["together"])]
        for name, program in programs.items()
        for kind, peak in program["memory"].items()
    ]
    header = ["program", "processes", "peak of one, MiB", "peak together, MiB (shared pages count in each)"]
    scaled = any(baseline["scaled"] for baseline in result["baselines"].values())
    note = "A baseline's peak is that of its one run, of all mixes' strategies and of no more trials than ran."
    return [table(header, rows), *([note] if scaled else [])]


def _cut_gains(result: Result) -> list[str]:
    rows = []
    for row in result["rows"]:
        seconds = [f"{row[name]:.2f}" for name in ("seconds_whole", "seconds_stored")]
        gains = [_ratio(row[name]) for name in ("expected", "measured")]
        rows.append([f"`{row['freeze']}`", row["cut"] or "none", *seconds, *gains])
    header = ["strategy", "cut at", "seconds of an epoch from pixels", "from stored features", "gain, as planned"]
    how = "One process with one thread; the first epoch, which compiles, is left out."
    return [f"## Gain of storing frozen layers, {result['side']} px", how, table([*header, "gain, measured"], rows)]


def _compiled_steps(result: Result) -> list[str]:
    training = [
        [f"`{row['freeze']}`", f"{row['plain']:.3f}", f"{row['xla']:.3f}", _ratio(row["xla"] / row["plain"])]
        for row in result["training"]
    ]
    return [
        f"## Compiled steps, {result['side']} px",
        f"An epoch's training from stored features, batches of {result['batch_size']}, one thread: XLA is not used, "
        "because it is slower on CPUs. How it does on GPUs is not measured.",
        table(["freeze", "seconds", "with XLA", "times slower"], training),
        "Extraction of pooled features by the images in a batch, one thread:",
        table(
            ["images in a batch", "images a second"], [[n, f"{rate:.0f}"] for n, rate in result["inference"].items()]
        ),
    ]


def _audit_speed(result: Result) -> list[str]:
    """Processor seconds of all files; what the loops took for fewer is scaled with files and with pairs."""
    files, share = result["files"], result["files"] / result["looped_files"]

    def seconds(way: str, steps: Mapping[str, float]) -> list[str]:
        own = [factor * result["seconds"][f"{way}: {step}"]["processor"] for step, factor in steps.items()]
        return [_seconds(sum(own)), f"{files / sum(own):,.0f}"]

    steps = ("read", "compare", "judge")
    rows = []
    for run in ("cold", "cached"):
        wall = sum(result["seconds"][f"{run}: {step}"]["wall"] for step in steps)
        found = result["audit"]
        rows.append([f"the audit, {run}", f"{files:,}", _seconds(wall), *seconds(run, dict.fromkeys(steps, 1.0))])
        rows[-1] += [f"{found['found']} of {result['planted']}", str(found["false"])]
    for name, found in result["loops"].items():
        way = "hashes" if "phash" in name else "pixels"
        wall = sum(result["seconds"][f"{way}: {step}"]["wall"] for step in ("read", "compare"))
        rows.append([name, f"{result['looped_files']:,}", _seconds(wall)])
        rows[-1] += [*seconds(way, {"read": share, "compare": share**2})]
        rows[-1] += [f"{found['found']} of {result['planted_looped']}", f"{found['false']:,}"]
    header = ["program", "files it ran on", "wall seconds of that", f"processor seconds for {files:,} files"]
    header += ["images per second of these", "planted copies found", "false pairs"]
    return [
        "## The audit of a data set",
        f"{result['images']:,} drawn chests of different patients, 299 px PNG, and a changed copy of one in a hundred. "
        "The audit also measures what the class follows from and cuts the split; the loops only look for copies. They "
        "ran on fewer files: their processor seconds are scaled, reading with the files, comparing with the pairs. "
        f"ImageHash {result['imagehash']}. False pairs are different patients taken for one image, of the files it ran "
        "on. Processor seconds are of all threads together; other programs may have slowed the wall time.",
        table(header, rows),
    ]


def _pixel_reader(result: Result) -> list[str]:
    rows = [[row["name"], f"{row['images_per_second']:,.0f}"] for row in result["rows"]]
    how = f"Images a second, median of {result['repeats']} passes over {result['images']} images, files in page cache."
    return [f"## Reading pixels, {result['side']} px", how, table(["reader", "images per second"], rows)]


def _many_trials(result: Result) -> list[str]:
    header = ["trials", "seconds", "until the last trial ended", "seconds per trial", "start-up, seconds"]
    header += ["driver's peak memory, MiB"]
    rows = [
        [
            str(row["trials"]),
            _seconds(row["seconds"]),
            _seconds(row["search_seconds"]),
            f"{row['seconds'] / row['trials']:.3f}",
            _seconds(row["startup_seconds"]),
            _mib(row["driver_bytes"]),
        ]
        for row in result["rows"]
    ]
    exponent = result["growth_exponent"]
    grown = NOT_MEASURED if exponent is None else f"{exponent:.2f} (1 is linear)"
    how = (
        f"Trials that train nothing, {result['epochs']} epochs each, on {result['workers']} workers, through Ray, "
        "Optuna's TPE, the record and MLflow. Seconds count until MLflow has everything; start-up comes on top."
    )
    return ["## Many trials", how, table(header, rows), f"Total seconds grow with the trials to the power {grown}."]


def _halving(result: Result) -> list[str]:
    ways = [
        [
            scenario["name"] if row is scenario["rows"][0] else "",
            row["way"],
            *(f"{100 * row[name]:.0f}" for name in ("spared", "found")),
            f"{row['regret']:.4f} ± {row['regret_error']:.4f}",
            *(f"{100 * row[name]:.0f}" for name in ("epochs", "seconds")),
        ]
        for scenario in result["scenarios"]
        for row in scenario["rows"]
    ]
    header = ["sweeps", "way", "best trial spared, %", "best strategy found, %", "mean regret", "epochs, %"]
    rungs, trials = " and ".join(map(str, result["rungs"])), result["scenarios"][0]["trials"]
    error = 100 * 0.5 / result["sweeps"] ** 0.5
    return [
        "## Halving, simulated",
        f"{result['sweeps']} sweeps a line, of {trials} trials of each of the five strategies below where nothing else "
        f"is said, {result['at_once']} at a time, {result['epochs']} epochs; rungs after {rungs} epochs, 1 in "
        f"{result['reduction_factor']} goes on. All ways run the same trials with the same noise.",
        "Best trial: the one that truly ends highest; spared if it ran to its end. Best strategy: that trial's; found "
        "if the trial with the best measured epoch, which the product would choose, is of it. Regret: macro F1 by "
        "which the chosen trial's true score lies below the best trial's end (± standard error; of the first two "
        f"percentages it is at most {error:.1f}). Epochs and training time: of what every trial to its end takes.",
        table([*header, "training time, %"], ways),
        *_curves(result),
    ]


def _darkcovidnet(result: Result) -> list[str]:
    rows = [
        [
            row["task"],
            row["grouping"],
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['interval']['low']:.1f} to {100 * row['interval']['high']:.1f}",
            ", ".join(f"{100 * value:.1f}" for value in row["by_fold"]),
            f"{100 * row['inner_accuracy']:.2f}",
            f"{100 * row['published']:.2f}{'' if row['grouping'] == 'image' else ' (by image)'}",
        ]
        for row in result["rows"]
    ]
    header = ["classes", "folds by", "accuracy, %", "95 % interval", "each fold", "inner folds", "published"]
    minutes = sum(row["seconds"] for row in result["rows"]) / 60
    return [
        "## The images of DarkCovidNet",
        "Mean accuracy over five held-out folds, beside that of Ozturk et al. 2020, whose folds are by image. The "
        f"configuration of each fold, one of {result['candidates']} heads on a frozen MobileNetV2 0.35, and "
        "its epochs were chosen by inner folds alone; the inner figure is that of the chosen ones, and optimistic. The "
        "list of candidates was drawn up after a look at the inner folds of one outer fold of the three classes. "
        f"Intervals are by bootstrap over the patients of all held-out images. {minutes:.0f} minutes in all.",
        table(header, rows),
    ]


def _fuzz_inputs(result: Result) -> list[str]:
    rows = [
        [
            part["kind"],
            f"{part['cases']:,}",
            f"{part['outcomes'].get('accepted', 0):,}",
            f"{part['outcomes'].get('refused', 0):,}",
            str(
                sum(part["outcomes"].values()) - sum(part["outcomes"].get(name, 0) for name in ("accepted", "refused"))
            ),
            f"{part['slowest']['seconds']:.2f}",
            _mib(part["peak_bytes"]),
        ]
        for part in result["parts"]
    ]
    stages = ", ".join(f"{count:,} {stage}" for stage, count in result["parts"][0]["stages"].items())
    return [
        "## Broken inputs",
        f"Search spaces, images and tables with mistakes in them, each following from seed {result['seed']} and its "
        "number. A fault is a traceback, a crash, a warning on the terminal, more than 5 s of processor time for one "
        "input or 2 GB, or a message that does not tell file and place. Search spaces by how far they were to go: "
        f"{stages}. A refused picture is counted and named; a folder is accepted with its broken pictures left out.",
        table(["inputs", "cases", "accepted", "refused", "faults", "slowest, s", "peak memory, MiB"], rows),
    ]


def _curves(result: Result) -> list[str]:
    rows = []
    for row in result["strategies"]:
        spans = [
            f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
            for values, digits in zip(zip(*row["fits"], strict=True), (2, 3, 1), strict=True)
        ]
        facts = [f"{100 * row['never']:.0f}", f"{row['noise']:.3f}", f"{row['seconds']:.2f}"]
        rows.append([f"`{row['freeze']}`", str(len(row["fits"])), *spans, *facts])
    header = ["strategy", "trials that learned", "start", "end", "tau, epochs", "never learn, %", "noise"]
    return [
        "The measured trials (`learning_curves.yaml`; mean, least and most of what was fitted, see "
        "`learning_curves.py`). The ends of a strategy's trials are moved together from sweep to sweep, with a "
        f"standard deviation of {result['between']}: an assumption. Trials are suggested at random; what TPE would "
        "make of the stopped ones is not simulated.",
        table([*header, "seconds of an epoch"], rows),
    ]


def _environment(facts: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 1024**3:.0f} GiB; Python {facts['python']}, "
        f"{versions}; commit {facts['commit']}, {facts['date']}:\n\n```sh\n{facts['command']}\n```"
    )


def _seconds(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,.1f}"


def _fraction(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1f}"


def _mib(value: float) -> str:
    return f"{value / MIB:,.0f}"
