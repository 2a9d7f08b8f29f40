"""Results as Markdown. Pure: JSON values in, text out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from comparing import mean_accuracy

Result = Mapping[str, Any]

MIB = 1024**2
NOT_MEASURED = "not measured"
LABELS = {
    "ray": "Ray Tune + Keras",
    "keras-tuner": "KerasTuner",
    "optuna": "Optuna loop",
    "strong": "strong: images in memory, warm processes",
}
ORDER = ("sweep_speed", "pixel_reader", "many_trials")


def render(results: Iterable[Result]) -> str:
    """All results as one page, sweeps first."""
    page = [
        "# Measured",
        "Written by `python benchmarks/sweep_speed.py --render DIR` from the JSON files of the runs. "
        "All figures are from CPUs; GPU figures are not measured.",
    ]
    for result in sorted(results, key=lambda result: (ORDER.index(result["kind"]), _size(result))):
        page.append(render_one(result))
    return "\n\n".join(page) + "\n"


def render_one(result: Result) -> str:
    """One result: a heading, its tables, and the machine, versions and command behind it."""
    kinds: Mapping[str, Callable[[Result], list[str]]] = {
        "sweep_speed": _sweep_speed,
        "pixel_reader": _pixel_reader,
        "many_trials": _many_trials,
    }
    return "\n\n".join([*kinds[result["kind"]](result), _environment(result["environment"])])


def _size(result: Result) -> int:
    """Sweeps of few trained layers first."""
    return max((trial["trainable_parameters"] for trial in result.get("product", {}).get("trials", ())), default=0)


def _sweep_speed(result: Result) -> list[str]:
    mix, product = result["mix"], result["product"]
    strategies = ", ".join(f"{count} `{freeze}`" for freeze, count in mix["counts"].items())
    images = f"{result['images']['train']} training and {result['images']['val']} validation images"
    heading = f"## Mix `{mix['name']}`: {strategies}; {mix['epochs']} epochs each, {result['side']} px"
    facts = f"{images}, weights `{result['weights']}`. The same trials, images and epochs in every program; no pruning."
    return [heading, facts, _programs(result), *_scaling_note(result), _product_seconds(product), _memory(result)]


def _programs(result: Result) -> str:
    product = result["product"]
    rows = [["cxr-sweep", str(result["mix"]["trials"]), _seconds(product["wall_seconds"])]]
    rows[0] += [_seconds(product["seconds"].get("startup")), "1", "1", *_accuracies(product, product), "-"]
    for name, baseline in result["baselines"].items():
        whole = _seconds(baseline["whole_seconds"]) + (" (scaled)" if baseline["scaled"] else "")
        rows.append([LABELS[name], str(len(baseline["trials"])), whole, _seconds(baseline["startup_seconds"])])
        rows[-1] += [_ratio(baseline["ratios"]["cold"]), _ratio(baseline["ratios"]["warm"])]
        rows[-1] += [*_accuracies(baseline, product), "yes" if baseline["same_parameters"] else "NO"]
    header = ["program", "trials run", "seconds, cold", "of them start-up", "ratio, cold", "ratio without start-up"]
    header += ["val accuracy", "cxr-sweep's on these trials", "same trainable parameters"]
    return table(header, rows)


def _accuracies(program: Result, product: Result) -> list[str]:
    """Mean validation accuracy after the last epoch, of the program and of the product on the same trials."""
    indices = [trial["index"] for trial in program["trials"]]
    return [f"{mean_accuracy(trials, indices):.3f}" for trials in (program["trials"], product["trials"])]


def _scaling_note(result: Result) -> list[str]:
    if not any(baseline["scaled"] for baseline in result["baselines"].values()):
        return []
    return [
        "Scaled: the baseline ran the trials of the second column, some of each strategy and each for all its epochs; "
        "the seconds of a strategy's other trials are taken to be their mean (scaled by epoch-trials). Start-up and "
        "exit are counted once, as measured."
    ]


def _product_seconds(product: Result) -> str:
    names = ("total", "startup", "features", "trials", "evaluate")
    light = product["speed_of_light"]
    fraction = light["fraction"] if light else None
    rows = [[_seconds(product["seconds"].get(name)) for name in names]]
    rows[0] += [_seconds(light["seconds"] if light else None)]
    rows[0] += [NOT_MEASURED if fraction is None else f"{fraction:.2f}"]
    return table([*(f"cxr-sweep: {name}" for name in names), "least possible", "speed of light"], rows)


def _memory(result: Result) -> str:
    programs = {"cxr-sweep": result["product"], **{LABELS[name]: own for name, own in result["baselines"].items()}}
    rows = [
        [name, kind, _mib(peak["largest"]), _mib(peak["together"])]
        for name, program in programs.items()
        for kind, peak in program["memory"].items()
    ]
    return table(["program", "processes", "peak of one, MiB", "peak together, MiB (shared pages count in each)"], rows)


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


def _environment(facts: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 1024**3:.0f} GiB; Python {facts['python']}, "
        f"{versions}; commit {facts['commit']}, {facts['date']}:\n\n```sh\n{facts['command']}\n```"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seconds(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,.1f}"


def _ratio(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1f}"


def _mib(value: float) -> str:
    return f"{value / MIB:,.0f}"
