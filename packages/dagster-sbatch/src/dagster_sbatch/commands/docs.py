"""Show the engine's documentation, which is installed with it."""

import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

import dagster_sbatch
from dagster_sbatch.commands.command_line import entry_point, make_parser
from dagster_sbatch.errors import nearest
from dagster_sbatch.text_file import read_text

DESCRIPTION = """\
List the pages of the engine's documentation, or show one. The pages belong to the installed version.
"""
EPILOG = """\
examples:
  scripts/docs              the pages and what each is about
  scripts/docs ray          one page
  scripts/docs ray | less   the same as plain Markdown, page by page

exit codes: 0 shown, 1 there is no such page, 2 wrong usage
"""


def docs_folder() -> Path:
    """Return the folder of the pages: in the wheel, or beside src/ in the repository."""
    package = Path(dagster_sbatch.__file__).parent
    return next(path for path in (package / "docs", package.parent.parent / "docs") if path.is_dir())


@entry_point()
def main() -> int:
    parser = make_parser(DESCRIPTION, EPILOG)
    parser.add_argument("page", nargs="?", help="a page, for instance: ray")
    asked = parser.parse_args()
    pages = {path.stem: path for path in sorted(docs_folder().glob("*.md"))}
    if asked.page is None:
        width = max(map(len, pages))
        for name, path in pages.items():
            print(f"{name:<{width}}  {read_text(path).splitlines()[0].removeprefix('# ')}")
        print(f"\nThe files are in {docs_folder()}")
        return 0
    if not (page := pages.get(Path(asked.page).stem)):
        print(f"There is no page {asked.page!r}{nearest(asked.page, pages)}", file=sys.stderr)
        print("To list the pages:\n  scripts/docs", file=sys.stderr)
        return 1
    text = read_text(page)
    Console().print(Markdown(text)) if sys.stdout.isatty() else print(text, end="")
    return 0
