"""Print the table of workloads of docs/performance.md, in Markdown, from the reports of `asyncbatch.profile`.

    python -m asyncbatch.profile --preset workloads --repeats 2 --out out
    python tools/report_table.py out/report.json
    python tools/report_table.py a/report.json b/report.json       the workloads of several calls (--only), one table

A line for each run; below it, where another engine is faster, what failed, and where and with what it was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from asyncbatch.profile import side_by_side
from asyncbatch.profile.compare import load
from asyncbatch.profile.report import OWN, Report, workload_key, workload_words
from asyncbatch.profile.text import DIFFERENT_TOKENS


def joined(reports: Sequence[Report]) -> Report:
    """One report with the runs of all. ValueError if one run stands in two of them, or there is none."""
    runs = tuple(run for report in reports for run in report.runs)
    counts = Counter((*workload_key(run), run.engine, run.mode) for run in runs)
    if not runs:
        raise ValueError("there is no run in it")
    if twice := [key for key, count in counts.items() if count > 1]:
        raise ValueError(f"{', '.join(str(part) for part in twice[0] if part)} stands in two of the reports")
    return replace(reports[0], runs=runs, failed=tuple(failed for report in reports for failed in report.failed))


def markdown(reports: Sequence[Report]) -> str:
    """The table and what has to be said below it."""
    whole = joined(reports)
    align = ["---" if place in side_by_side.TEXT_COLUMNS else "---:" for place in range(len(side_by_side.HEAD))]
    rows = [side_by_side.HEAD, align, *side_by_side.lines(whole)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *_below(reports, whole)])


def _below(reports: Sequence[Report], whole: Report) -> Iterator[str]:
    yield from side_by_side.sentences(whole)
    if not all(report.same_tokens for report in reports):
        yield DIFFERENT_TOKENS
    elif any(run.engine == OWN for run in whole.runs):
        yield f"{OWN}: all runs of a workload gave the same tokens."
    for engine in sorted({name for report in reports for name, same in report.peers_same_tokens.items() if not same}):
        yield f"{engine}: sync and async gave different tokens."
    for failed in whole.failed:
        yield f"{workload_words(failed)}: {failed.engine} {failed.mode} was not measured: {failed.error}"
    for report in reports:
        yield f"*{', '.join(_measured(report))}.*"
    yield from dict.fromkeys(f"*{run.setting}.*" for run in whole.runs if run.engine != OWN and run.setting)


def _measured(report: Report) -> Iterator[str]:
    """With what a report was measured; what is not known is left out."""
    names = dict.fromkeys(workload_words(run) for run in report.runs)
    yield f"{'; '.join(names)}: {report.gpu.name if report.gpu else report.device}"
    if report.copy_bandwidth_bytes_per_s:
        yield f"copy {report.copy_bandwidth_bytes_per_s / 1e12:.2f} TB/s"
    if report.matmul_flops_per_s:
        yield f"matrix products {report.matmul_flops_per_s / 1e12:.0f} TFLOP/s"
    for name in ("torch", "transformers", "triton"):
        if report.versions.get(name):
            yield f"{name} {report.versions[name]}"
    if report.gpu and report.gpu.driver:
        yield f"driver {report.gpu.driver}"
    counts = {len(run.wall_s_of_each_run) for run in report.runs}
    yield f"the median of {' or '.join(map(str, sorted(counts)))} runs"
    yield str(report.date).partition("T")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print a table in Markdown from reports of asyncbatch.profile.")
    parser.add_argument("reports", nargs="+", metavar="REPORT.json")
    paths = parser.parse_args(arguments).reports
    try:
        print(markdown([load(path, "report") for path in paths]))
    except ValueError as error:
        print(f"report_table.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
