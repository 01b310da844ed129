"""The profiling script: how idle is the device, and what does asynchronous batching bring?

    python -m asyncbatch.profile --model smollm2 --batch-size 8 --out out
    python -m asyncbatch.profile --emulate h200-llama-8b --new-tokens 64
    python -m asyncbatch.profile --preset headline --record h200-llama-8b --out out       (needs a GPU)

It serves the same requests with both batchers, in turns and several times, checks that the tokens are the same, and
says what to eliminate first, what asynchronous batching brings, and how the idle time divides. `--json` prints the same
as JSON (docs/report.md describes each field), and `--out` writes it as a page, as JSON, as a picture and as a trace.
Every number is measured here and now, except the device's times of `--emulate`, which come from a recording. Each
column of the table is the run of median wall time. `--compare` and `--trace` measure nothing.

From the command line to the page: `cli` calls `options` (what was typed), `settings` (what that means), `session` (all
workloads) and `turns` (one workload, served in turns); `in_memory` does the same for a model that is there already.
What was measured (`measurement`) becomes a `report` in `diagnosis` and `explanation`, and `text`, `terminal` and `page`
show it.
"""
