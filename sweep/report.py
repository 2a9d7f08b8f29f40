"""`python -m sweep.report RUN_DIR`: one self-contained page that answers what the sweep asked.

Everything on the page is computed from the run folder, so that no figure is typed by hand, and the test figures, the
confusion matrix and the per-class table come from one set of predictions.
"""

import argparse
import base64
import io
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image
from platformdirs import user_cache_path
from rich.console import Console

from cxr_models.storage import written_whole
from cxr_models.trial import NO_MASK, SEGMENT, SPLITS, Outcome
from sweep import plots
from sweep.audit_record import pair_pictures, read_audit
from sweep.progress import StepProgress
from sweep.readback import Run, read_run
from sweep.record import RunFolder
from sweep.reference import compare, plain_name
from sweep.remote import Store, is_url
from sweep.report_data import (
    axis_rows,
    best_row,
    calibrated_rows,
    class_rows,
    contradictions,
    doctor_rows,
    evaluated_metrics,
    evaluated_parts,
    evaluated_rows,
    fold_rows,
    further_figures,
    overview,
    provenance,
    reading_notes,
    recall_intervals,
    report_rows,
    seed_rows,
    split_counts,
    strategy_rows,
)
from sweep.results_view import seeds_text
from sweep.run_home import run_folder_at
from sweep.samples import Pictures
from sweep.segment_report import overlay_rows
from sweep.tasks import SHOWN_AXES_OF
from sweep.verdict_view import coded, difference_rows
from sweep.wording import count, duration, figure, heading, metric_name, percentage_points, setting


def write_report(folder: RunFolder) -> Path:
    """Write `report.html` from the other files of the folder.

    Raises:
        ValueError: the folder is not one of a sweep, or a file in it cannot be understood.
    """
    page = render(read_run(folder))
    with written_whole(folder.report) as scratch:
        scratch.write_text(page, encoding="utf-8")
    return folder.report


def render(run: Run) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("sweep"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    audit = read_audit(run.folder)
    environment.filters.update(
        setting=setting,
        duration=partial(duration, tenths=True),
        figure=figure,
        metric=metric_name,
        jpeg=_jpeg,
        counted=count,
        points=percentage_points,
        class_rows=report_rows,
        plain=plain_name,
        heading=heading,
        coded=coded,
    )
    verdict = run.summary.get("verdict") or {}
    compared = bool(verdict.get("comparisons"))
    return environment.get_template("report.html").render(
        run=run,
        metric=run.objective.metric,
        metrics=_tested_metrics(run),
        overview=overview(run),
        best=run.ranking[0] if run.ranking else None,
        strategies=strategy_rows(run),
        segmented=run.objective.task == SEGMENT,
        axes=SHOWN_AXES_OF[run.objective.task],
        varied=run.varied,
        axis_rows=axis_rows(run),
        constants=[axis for axis in SHOWN_AXES_OF[run.objective.task] if axis not in run.varied],
        failed=[result for result in run.results if result.outcome is Outcome.FAILED],
        unranked=[result for result in run.results if result.outcome is not Outcome.FAILED and not result.best_epoch],
        contradictions=contradictions(run),
        reading_notes=reading_notes(run),
        doctor=doctor_rows(run),
        per_class=class_rows(run.final) if run.final else [],
        recall_intervals=recall_intervals(run),
        verdict=verdict,
        difference_rows=difference_rows(verdict, of_reference=True) if compared else [],
        other_pairs=difference_rows(verdict, of_reference=False) if compared else [],
        further=further_figures(run),
        calibrated=calibrated_rows(run),
        evaluated=evaluated_rows(run),
        fold_rows=fold_rows(run),
        seeds_text=seeds_text(best_row(run), run.objective.metric),
        seed_rows=seed_rows(run),
        final_doctor=best_row(run).get("final_doctor", []),
        parts=evaluated_parts(run),
        evaluated_metrics=evaluated_metrics(run),
        comparisons=compare(run.reference, run.summary) if run.reference else (),
        best_seconds={result.trial_id: result.train_seconds for result in run.results},
        splits=SPLITS,
        split_rows=split_counts(run.split) if run.split is not None else [],
        figures=_figures(run),
        audit=audit,
        pairs=list(pair_pictures(run.folder, audit)),
        overlays=overlay_rows(run.folder),
        masked=bool(run.ranking) and run.ranking[0].config.lung_mask != NO_MASK,
        command=f"python -m sweep.run {shlex.quote(str(run.folder.spec))}",
        provenance=provenance(run),
        spec=run.folder.spec.read_text(encoding="utf-8") if run.folder.spec.is_file() else "",
    )


def _tested_metrics(run: Run) -> list[str]:
    """The objective first, then the others; the loss, which has no natural scale, last."""
    order = dict.fromkeys((run.objective.metric, *(name for name in run.objective.metrics if name != "loss"), "loss"))
    return [name for name in order if name in (run.summary.get("test") or {})]


def _figures(run: Run) -> dict[str, str]:
    """Figure -> its data URI: a picture of its own, whose element ids cannot clash with another's in the page."""
    figures: dict[str, Figure] = {}
    if run.ranking:
        epochs = [metrics for trial in run.epochs.values() for metrics in trial]
        figures["strategies"] = plots.strategy_comparison(run.results, run.objective)
        figures["curves"] = plots.sweep_curves(epochs, run.results, run.objective)
    if (run.summary.get("verdict") or {}).get("comparisons"):
        figures["differences"] = plots.differences(run.summary["verdict"], run.objective)
    if run.final:
        figures["confusion"] = plots.confusion_matrix(run.final.matrix.astype(np.float64), run.final.classes)
    return {name: _data_uri(plots.svg(figure)) for name, figure in figures.items()}


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _jpeg(pixels: Pictures) -> str:
    """An image (side, side, channels) as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m sweep.report", description="Write report.html of a run folder.")
    parser.add_argument("run_dir", help="the folder a sweep wrote, ended or interrupted, by its path or its URL")
    given = parser.parse_args(arguments).run_dir
    try:
        if is_url(given):
            print(_report_at(given))
        else:
            print(write_report(RunFolder(Path(given))))
    except ValueError as error:
        print(f"cannot report on {given}: {error}", file=sys.stderr)
        return 2
    return 0


def _report_at(url: str) -> str:
    """Write the report of a run folder at a URL there, from a copy in the cache; where it lies."""
    home, folder = run_folder_at(url, user_cache_path("cxr-sweep"))
    home.bring(folder, StepProgress(Console(stderr=True)))
    Store(url).put(folder.report.name, write_report(folder))
    return home.shown(folder.report)


if __name__ == "__main__":
    sys.exit(main())
