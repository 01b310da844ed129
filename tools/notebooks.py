"""Run the notebooks and save them in their one canonical form; or say what is not canonical.

    python tools/notebooks.py                      run all of notebooks/ and save them
    python tools/notebooks.py notebooks/00*.ipynb  only these
    python tools/notebooks.py --keep-outputs       save in canonical form without running (after a change to text)
    python tools/notebooks.py --check              change nothing, run nothing; exit 1 and say what is wrong
    python tools/notebooks.py --students FOLDER    make copies for a class, without results and without answers
    python tools/notebooks.py --key FOLDER         make the answer key: results, solutions and answers, all open

Canonical: executed from top to bottom with counts 1 to n, stable cell ids, no widget state, no times or paths of the
machine, no errors, nothing on stderr, under 300 KB, JSON with sorted keys. A reader without a kernel, on GitHub say,
sees every result and picture, and a change of a notebook is a readable change in git.

A reader works in copies of their own, which hold no results (`asyncbatch lab`, asyncbatch/tour/notebooks.py);
tools/copies.py says what copies for a class leave out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from asyncbatch.tour import links
from tools import copies

FOLDER = Path(__file__).parent.parent / "notebooks"
MAX_BYTES = 300_000
CELL_TIMEOUT_S = 300
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|Users|opt|usr|tmp/ipykernel\w*|var/folders)/|[A-Z]:\\\\?Users")
RAISES_TAG, RAISES_COMMENT = "raises-exception", "NBVAL_RAISES_EXCEPTION"


def canonical(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook without anything that depends on the machine or the day, and with regular counts and ids."""
    book = nbformat.from_dict(notebook)
    book.nbformat, book.nbformat_minor = 4, 5
    book.metadata = nbformat.from_dict(METADATA)
    ids: set[str] = set()
    count = 0
    for cell in book.cells:
        cell.id = _cell_id(cell, ids)
        ids.add(cell.id)
        cell.metadata = _authors_metadata(cell.metadata)
        if cell.cell_type != "code":
            continue
        if cell.execution_count is not None:
            count += 1
            cell.execution_count = count
        cell.outputs = _canonical_outputs(cell.outputs, cell.execution_count)
    return book


def _cell_id(cell: NotebookNode, others: set[str]) -> str:
    """Return the cell's own id. A cell without one, or with one of `others`, gets one made from its content."""
    name = cell.get("id")
    number = 0
    while not name or name in others:
        name = hashlib.sha256(f"{cell.cell_type}\n{cell.source}\n{number}".encode()).hexdigest()[:8]
        number += 1
    return name


def _authors_metadata(metadata: dict) -> NotebookNode:
    """Return the part of a cell's metadata that its author chose: tags, and what is folded."""
    choices: dict = {}
    if metadata.get("tags"):
        choices["tags"] = list(metadata["tags"])
    folding = {key: True for key in ("source_hidden", "outputs_hidden") if metadata.get("jupyter", {}).get(key)}
    if folding:
        choices["jupyter"] = folding
    return nbformat.from_dict(choices)


def _canonical_outputs(outputs: list[NotebookNode], count: int | None) -> list[NotebookNode]:
    """Return the outputs with texts joined that the kernel cut, and without ids and metadata of the session.

    `count` is the cell's execution count."""
    result: list[NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            before = result[-1] if result and result[-1].get("name") == output.name else None
            if before is not None:  # the kernel cuts one text anywhere
                before.text += output.text
                continue
        if "metadata" in output:
            output.metadata = NotebookNode()
        if "data" in output:
            output.data.pop(WIDGET_VIEW, None)  # a random id; without it, a reader without a kernel sees the picture
            for kind, value in output.data.items():
                if kind.startswith("image/") and isinstance(value, str) and kind != "image/svg+xml":
                    output.data[kind] = value.replace("\n", "")
            if not output.data:
                continue
        if output.output_type == "execute_result":
            output.execution_count = count
        result.append(output)
    for output in result:
        if output.output_type == "stream":  # a progress bar writes over its own line: keep what stays
            output.text = re.sub(r"[^\n]*\r(?!\n|$)", "", output.text)
    return result


def text_of(notebook: NotebookNode) -> str:
    """Return the file's text: indent 1, sorted keys, newline at the end."""
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def faults(path: Path) -> list[str]:
    """Return what keeps the file from being canonical, a line for each fault; none when it is. Cells count from 0."""
    text = path.read_text(encoding="utf-8")
    try:
        book = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
        nbformat.validate(book)
    except Exception as error:  # whatever is wrong with the JSON, its first line tells the reader enough
        return [f"is not a valid notebook: {str(error).splitlines()[0]}"]
    problems: list[str] = []
    in_cells: dict[str, list[str]] = {}  # fault -> numbers of the cells that have it
    if len(text.encode()) >= MAX_BYTES:
        problems.append(f"has {len(text.encode()):,} bytes, {MAX_BYTES:,} or more")
    if "widgets" in book.metadata:
        problems.append("holds widget state (metadata.widgets)")
    count = 0
    for number, cell in enumerate(book.cells):
        for fault in _cell_faults(cell):
            in_cells.setdefault(fault, []).append(str(number))
        if cell.cell_type == "code":
            count += 1
            if cell.execution_count is None:
                in_cells.setdefault("not executed", []).append(str(number))
            elif cell.execution_count != count:
                in_cells.setdefault("execution counts are not 1 to n", []).append(str(number))
    problems += [f"{fault} (cell {', '.join(numbers)})" for fault, numbers in in_cells.items()]
    if not problems:
        canonical_text = text_of(canonical(book))
        if canonical_text != text:
            lines = zip(text.splitlines(), canonical_text.splitlines(), strict=False)
            line = next((i for i, (ours, theirs) in enumerate(lines, 1) if ours != theirs), "last")
            problems.append(f"is not in canonical form (first difference in line {line})")
    return problems


def _cell_faults(cell: NotebookNode) -> list[str]:
    """Return what one cell holds that a canonical notebook may not hold."""
    problems: list[str] = []
    extra = sorted(set(cell.metadata) - {"tags", "jupyter"})
    if extra:
        problems.append(f"metadata of one session: {', '.join(extra)}")
    texts = [cell.source]
    may_raise = RAISES_TAG in cell.metadata.get("tags", []) or RAISES_COMMENT in cell.source
    for output in cell.get("outputs", []):
        if output.output_type == "error" and not may_raise:
            problems.append(f"ended with an error: {output.ename}")
        if output.output_type == "stream" and output.name == "stderr" and not may_raise:
            problems.append(f"wrote to stderr: {output.text.strip().splitlines()[0] if output.text.strip() else ''!r}")
        data = output.get("data", {})
        if WIDGET_VIEW in data:
            problems.append("a widget's id, which hides the picture")
        texts += [str(value) for kind, value in data.items() if not kind.startswith("image/")]
        texts += [output.get("text", ""), "\n".join(output.get("traceback", []))]
    match = next((match for text in texts if (match := MACHINE_PATH.search(text))), None)
    if match:
        problems.append(f"path of one machine: {match.string[match.start() :].split(None, 1)[0][:60]}")
    return problems


def run(path: Path, notebook: NotebookNode) -> None:
    """Execute the notebook in place, in its own folder, with this interpreter's kernel. Raises at the first error."""
    from nbclient import NotebookClient  # not needed, and slow, for a check

    # IPython colours and line widths must not depend on the terminal this runs in.
    # Nor on what whoever runs it has answered before.
    os.environ.update(COLUMNS="100", LINES="40", ASYNCBATCH_ANSWERS="")
    NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()


def make_copies(originals: Sequence[Path], own: Path, kind: str) -> str:
    """Copy the notebooks into the folder `own`, in a form of copies.KINDS, and say what was made and what was there.

    What is there stays as it is. A link to what is not there, beside the copy, becomes its words. Whatever stops it, no
    copy is left half written. OSError if `own` cannot be written."""
    made, there = [], []
    own.mkdir(parents=True, exist_ok=True)
    for original in originals:
        if (own / original.name).exists():
            there.append(original.name)
            continue
        book = copies.KINDS[kind](canonical(nbformat.reads(original.read_text(encoding="utf-8"), as_version=4)))
        links.in_book(book, links.of_copy(original, own, {each.name for each in originals}))
        draft = own / f".{original.name}.new"
        draft.write_text(text_of(book), encoding="utf-8", newline="\n")
        draft.replace(own / original.name)
        made.append(original.name)
    numbers = {
        word: " ".join(name.split("_")[0] for name in names) for word, names in (("made", made), ("kept", there))
    }
    told = "; ".join(f"{word} {names or 'none'}" for word, names in numbers.items())
    return f"{own.name}/, {copies.TITLES[kind]}: {told} (for a fresh copy, rename or delete yours)"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks and save them in canonical form.")
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (all of notebooks/ when left out)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="change nothing; exit 1 and say what is not canonical")
    mode.add_argument("--keep-outputs", action="store_true", help="do not run, only save in canonical form")
    mode.add_argument("--students", type=Path, metavar="FOLDER", help="make copies for a class, without answers")
    mode.add_argument("--key", type=Path, metavar="FOLDER", help="make the answer key")
    options = parser.parse_args(arguments)
    paths = [path.resolve() for path in options.paths or sorted(FOLDER.glob("*.ipynb"))]
    wanted = {"students": options.students, "key": options.key}
    for kind, folder in wanted.items():
        if folder is not None:
            try:
                print(make_copies(paths, folder, kind))
            except OSError as error:
                print(f"{folder.name}/ cannot be written: {error}", file=sys.stderr)
                return 1
            return 0
    bad = 0
    for path in paths:
        if not options.check:
            print(f"{path.name}: {'saving' if options.keep_outputs else 'running'}", flush=True)
            book = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
            if not options.keep_outputs:
                try:
                    run(path, book)
                except Exception as error:  # any failure: say which notebook, leave the file as it was, go on
                    print(f"{path.name}: failed and not saved\n{error}", file=sys.stderr)
                    bad += 1
                    continue
            path.write_text(text_of(canonical(book)), encoding="utf-8", newline="\n")
        problems = faults(path)
        for problem in problems:
            print(f"{path.name}: {problem}", file=sys.stderr)
        bad += bool(problems)
    if bad:
        print(
            f"{bad} of {len(paths)} notebooks are not canonical; `make notebooks` runs and saves them", file=sys.stderr
        )
    else:
        print(f"{len(paths)} notebooks are canonical")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
