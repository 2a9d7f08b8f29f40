"""A plan as a person reads it: what `--plan` and the start of every sweep print."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cxr_models.cohort import subset_words
from cxr_models.splits import patients_on_two_sides
from cxr_models.storage import size_text
from cxr_models.trial import TEST, TRAIN
from sweep.audit_view import render_audit
from sweep.caching import PhaseCache
from sweep.plan import Plan
from sweep.space import Constant
from sweep.tasks import SHOWN_AXES_OF
from sweep.wording import count


def render_plan(plan: Plan) -> RenderableType:
    """The plan as a person reads it."""
    spec, allotment = plan.spec, plan.allotment
    device = f"{allotment.gpus_per_trial:g} GPU" if allotment.gpus_per_trial else "no GPU"
    facts = Table.grid(padding=(0, 2))
    images = subset_words(len(plan.manifest.records), plan.manifest.spared, spec.data.subset)
    for name, value in (
        ("data", f"{spec.data.name} ({plan.manifest.layout}), {images}"),
        ("patients", f"{plan.manifest.patients}, {_two_sides(plan)}"),
        ("objective", f"validation {spec.objective.metric}, {spec.objective.mode}imum{_mean(plan)}"),
        ("search", f"{spec.search.algorithm}, {count(plan.trials, 'trial')}, {_length(plan)}"),
        ("halving", plan.halving.sentence or "none: every trial runs to its end, unless it proves hopeless"),
        ("final", _final(plan)),
        (
            "resources",
            f"{_counted(allotment.concurrency, 'trial')} at once, each with "
            f"{_counted(allotment.cpus_per_trial, 'CPU')}, {device} and {_counted(allotment.threads, 'thread')}",
        ),
    ):
        facts.add_row(Text(name, style="bold"), Text(value))
    notes = [Text(f"note: {note}", style="yellow") for note in plan.notes]
    networks = (_unet_table(plan),) if plan.unets else (_strategy_table(plan), *_cache(plan))
    nodes = _nodes(plan) if plan.machine.is_cluster else ()
    return Group(
        facts,
        *nodes,
        _split_table(plan),
        render_audit(plan.audit),
        _axis_table(plan),
        _constants(plan),
        *networks,
        *notes,
    )


def _nodes(plan: Plan) -> tuple[RenderableType, ...]:
    """Where the trials of a cluster will run, and how many wait."""
    table = _table("Nodes: where trials run", ("address",), numbers=("CPUs", "GPUs", "memory", "trials at once"))
    for node in plan.machine.nodes:
        memory = size_text(node.memory_bytes)
        table.add_row(node.address, str(node.cores), str(node.gpus), memory, str(plan.allotment.slots(node)))
    at_once = plan.allotment.concurrency
    waiting = max(0, plan.trials - at_once)
    wait = f"; {count(waiting, 'trial')} wait for one of these to end, or for nodes that join" if waiting else ""
    return table, Text(f"{count(min(at_once, plan.trials), 'trial')} at once{wait}")


def _length(plan: Plan) -> str:
    return f"at most {count(plan.max_epochs, 'epoch')} each"


def _mean(plan: Plan) -> str:
    data = plan.spec.data
    if data.folds is None:
        return ""
    repeated = f", dealt {data.repeats} times" if data.repeats > 1 else ""
    return f", the mean over {data.folds} folds{repeated}: {data.folds * data.repeats} trainings a trial"


def _final(plan: Plan) -> str:
    images = "the images of all folds" if len(plan.folds) else "train and val"
    if not len(plan.indices(TEST)):
        return f"the best configuration trained again on {images}; there is no test set"
    seeds = _counted(plan.spec.final.seeds, "seed")
    if plan.unets:
        first = "then tested" if plan.spec.final.seeds == 1 else "the first of them tested"
        return f"the best configuration trained again on {images} ({seeds}), {first}"
    return f"each strategy's best configuration trained again on {images} ({seeds}), then tested"


def _unet_table(plan: Plan) -> Table:
    numbers = ("filters", "depth", "image side", "parameters", "memory of a step")
    table = _table("U-Nets: every parameter trains; memory is an estimate", (), numbers=numbers)
    for row in plan.unets:
        table.add_row(*row.cells)
    return table


def _split_table(plan: Plan) -> Table:
    table = _table("Images by part", ("part",), numbers=(*plan.manifest.classes, "all", "patients"))
    for part, counts in plan.class_counts().items():
        if not counts:
            continue  # a sweep may have no test part
        own = [f"{counts[name]:,}" for name in plan.manifest.classes]
        name = f"{plan.spec.data.folds} folds" if part == TRAIN and len(plan.folds) else part
        table.add_row(name, *own, f"{counts.total():,}", f"{plan.patients(part):,}")
    return table


def _axis_table(plan: Plan) -> Table:
    table = _table("Search space", ("axis", "values", "where"), numbers=())
    for axis in plan.spec.space.axes.values():
        if not axis.cases and isinstance(axis.domain, Constant):
            continue
        for case in axis.cases:
            table.add_row(axis.name, Text(str(case.domain)), Text(case.text))
        table.add_row(axis.name, Text(str(axis.domain)), "otherwise" if axis.cases else "")
    return table


def _two_sides(plan: Plan) -> str:
    astray = patients_on_two_sides(plan.manifest, plan.splits)
    return f"{len(astray)} ON TWO SIDES of the given split" if astray else "none on two sides of the split"


def _constants(plan: Plan) -> Text:
    own = SHOWN_AXES_OF[plan.spec.task]
    axes = [axis for axis in plan.spec.space.axes.values() if axis.name in own]
    fixed = (f"{axis.name} {axis.domain}" for axis in axes if not axis.cases and isinstance(axis.domain, Constant))
    return Text(f"the same in every trial: {', '.join(fixed)}")


def _strategy_table(plan: Plan) -> Table:
    table = _table(
        "Strategies and their parameters", ("backbone", "freeze", "batch norm"), numbers=("trainable", "frozen")
    )
    for row in plan.strategies:
        table.add_row(row.backbone, row.freeze, row.batch_norm, _counts(row.trainable), _counts(row.frozen))
    return table


def _cache(plan: Plan) -> tuple[RenderableType, ...]:
    if plan.cache.budget is None:
        return (Text("no features are kept: every trial runs its frozen layers in every epoch"),)
    limit = (
        "sizes are of all training and validation images; computing is an estimate of forward and backward work. "
        f"Features may take {size_text(plan.cache.budget.limit_bytes)} in {plan.cache.budget.folder}"
    )
    return _cache_table(plan), Text(limit)


def _cache_table(plan: Plan) -> Table:
    title = "Frozen layers, computed once: what is stored and what it spares"
    table = _table(title, ("backbone", "freeze", "stored output of"), numbers=("size", "computing per epoch"))
    for row in plan.strategies:
        phases = [_spread(phase) for phase in zip(*row.caches, strict=True)]
        cells = (", then ".join(part) for part in zip(*phases, strict=True))
        table.add_row(row.backbone, row.freeze, *cells)
    return table


def _table(title: str, names: tuple[str, ...], *, numbers: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _counted(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


def _spread(phase: tuple[PhaseCache, ...]) -> tuple[str, str, str]:
    """One phase over all heads and image sides: cuts, sizes and gains."""
    cuts = sorted({cache.cut.name if cache.cut else "nothing" for cache in phase})
    sizes = sorted({cache.stored_bytes for cache in phase})
    gains = sorted({cache.gain for cache in phase})
    size = size_text(sizes[0]) if len(sizes) == 1 else f"{size_text(sizes[0])} to {size_text(sizes[-1])}"
    gain = _rounded(gains[0]) if len(gains) == 1 else f"{_rounded(gains[0])} to {_rounded(gains[-1])}"
    return " or ".join(cuts), size if sizes[-1] else "-", f"{gain} times less" if gains[-1] > 1 else "the same"


def _rounded(gain: float) -> str:
    return f"{gain:.1f}" if gain < 20 else f"{float(f'{gain:.1g}'):,.0f}"


def _counts(phases: tuple[tuple[int, int], ...]) -> str:
    spans = [f"{low:,}" if low == high else f"{low:,} to {high:,}" for low, high in phases]
    return ", then ".join(spans)
