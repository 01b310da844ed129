"""Write the badges under the title of the README and of each notebook, and their pictures in docs/badges/.

    python tools/badges.py                     what needs no address: where it runs, what checks it, the licence
    python tools/badges.py --repo OWNER/NAME   "Open in Colab" and "Open in Binder" too, for that GitHub repository
    python tools/badges.py --check             change nothing; exit 1 and name the files that are not as they would be

The badges stand between two comments, `<!-- badges -->` and `<!-- /badges -->`, which this tool puts below the title
where they are missing. A repository once named is kept: the README's own badge says which. All pictures are files of
this repository, so a page that shows them fetches nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from html import escape
from pathlib import Path
from urllib.parse import quote

import nbformat

sys.path.insert(0, str(Path(__file__).parent.parent))
from tools.notebooks import canonical, text_of

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- badges -->", "<!-- /badges -->"
BLOCK = re.compile(rf"{BEGIN}\n.*?{END}\n", re.DOTALL)
REPO = re.compile(r"[\w-][\w.-]*/[\w.-]+")
LOCAL = {  # name of the file -> the two halves of the badge
    "runs-on": ("runs on", "CPU and CUDA"),
    "checked-by": ("checked by", "nbval, strict"),
    "licence": ("licence", "Apache 2.0"),
}
HOSTED = {"colab": ("open in", "Colab"), "binder": ("open in", "Binder")}
FIRST = "notebooks/00_start_here.ipynb"  # what the README's badges open
CHARACTER, PAD, HEIGHT = 6.4, 8, 20  # pixels


def svg(label: str, value: str) -> str:
    """A badge: a grey half with `label`, a blue one with `value`, both in white, wide enough for any font."""
    widths = [round(CHARACTER * len(text)) for text in (label, value)]
    left, whole = widths[0] + 2 * PAD, sum(widths) + 4 * PAD
    texts = "".join(
        f'<text x="{x}" y="14" textLength="{width}">{escape(text)}</text>'
        for text, x, width in ((label, PAD, widths[0]), (value, left + PAD, widths[1]))
    )
    name = f"{escape(label)}: {escape(value)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{whole}" height="{HEIGHT}" role="img" aria-label="{name}">'
        f"<title>{name}</title>"
        f'<rect width="{whole}" height="{HEIGHT}" rx="3" fill="#0072B2"/>'
        f'<path d="M3 0h{left - 3}v{HEIGHT}H3a3 3 0 0 1-3-3V3a3 3 0 0 1 3-3z" fill="#444444"/>'
        f'<g fill="#FFFFFF" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">{texts}</g></svg>\n'
    )


def block(page: str, opens: str, repo: str | None, branch: str) -> str:
    """The badges of `page` (a path in the repository), between their comments; `opens` is the notebook they open."""
    up = "../" * page.count("/")
    lines = [" ".join(f"![{a.capitalize()}: {b}]({up}docs/badges/{name}.svg)" for name, (a, b) in LOCAL.items())]
    if repo:
        where = {
            "colab": f"https://colab.research.google.com/github/{repo}/blob/{branch}/{opens}",
            "binder": f"https://mybinder.org/v2/gh/{repo}/{branch}?labpath={quote(opens, safe='')}",
        }
        lines.append(
            " ".join(
                f"[![{a.capitalize()} {b}]({up}docs/badges/{name}.svg)]({where[name]})"
                for name, (a, b) in HOSTED.items()
            )
        )
        clone = f"/content/{repo.split('/')[1]}"
        lines.append(
            "\nIn Colab, run this first, in a cell of its own: "
            f"`!git clone --depth 1 https://github.com/{repo} {clone}` and `%env ASYNCBATCH_CLONE={clone}`."
        )
    return "\n".join([BEGIN, *lines, END, ""])


def placed(text: str, badges: str) -> str:
    """`text` (Markdown with a title in its first line) with its block of badges exchanged, or put below the title."""
    if BLOCK.search(text):
        return BLOCK.sub(lambda _: badges, text, count=1)
    title, _, rest = text.partition("\n")
    if not title.startswith("# "):
        raise ValueError(f"the first line is {title[:60]!r}: a title is allowed, as in '# 00 Start here'")
    return f"{title}\n\n{badges}\n{rest.lstrip(chr(10))}"


def wanted(root: Path, repo: str | None, branch: str) -> dict[Path, str]:
    """Every file that has to do with badges -> the text that it should have."""
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    known = re.search(r"github/([^/]+/[^/]+)/blob/([^/]+)/", (BLOCK.search(text) or [""])[0])
    if known and not repo:
        repo, branch = known[1], known[2]
    files = {root / "docs" / "badges" / f"{name}.svg": svg(*halves) for name, halves in (LOCAL | HOSTED).items()}
    files[readme] = placed(text, block("README.md", FIRST, repo, branch))
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        book = canonical(nbformat.reads(path.read_text(encoding="utf-8"), as_version=4))
        page = f"notebooks/{path.name}"
        try:
            book.cells[0].source = placed(book.cells[0].source, block(page, page, repo, branch))
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from None
        files[path] = text_of(book)
    return files


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Write the badges of the README and of the notebooks.")
    parser.add_argument("--repo", help="the public GitHub repository, as OWNER/NAME")
    parser.add_argument("--branch", default="main", help="its branch that readers see (main)")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 and say what is not as it would be"
    )
    options = parser.parse_args(arguments)
    if options.repo is not None and not REPO.fullmatch(options.repo):
        parser.error(f"--repo is {options.repo!r}: allowed is OWNER/NAME")
    try:
        files = wanted(root, options.repo, options.branch)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    other = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in other:
        print(f"{path.relative_to(root).as_posix()}: {'badges differ' if options.check else 'written'}")
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path], encoding="utf-8", newline="\n")
    if options.check and other:
        print(f"{len(other)} files do not have the badges that they should; `make badges` writes them", file=sys.stderr)
    return int(options.check and bool(other))


if __name__ == "__main__":
    sys.exit(main())
