"""The table of docs/families.md, made from what tests say and from nothing else.

A test marked ``@pytest.mark.support("COLUMN")`` with a parameter ``case`` fills the cell of that family and column: yes
if every such test passed, no if one failed, or if one that passed says so (``record_property("support", "no")``), which
is how a refusal is tested. Cells whose tests did not run stay as they are.

    pytest tests -m support --support-table     writes the table
    pytest ...                                  fails where a cell that ran is not what the committed table says
"""

from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
COLUMNS = ("view exact", "copy exact", "all stages", "saves, loads", "generates", "plan", "native export", "GGUF")
BEGIN, END = "<!-- table: written by pytest --support-table -->", "<!-- end of table -->"
YES, NO, UNKNOWN = "yes", "no", ""

Cells = dict[tuple[str, str], str]
OUTCOMES = pytest.StashKey[Cells]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-table", action="store_true", help="write the table of docs/families.md from what ran")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    for marker in item.iter_markers("support"):
        place = item.callspec.params["case"], marker.args[0]  # type: ignore[attr-defined]
        assert place[1] in COLUMNS, f"the table has no column {place[1]!r}"
        cells = item.config.stash.setdefault(OUTCOMES, {})
        if report.failed or (report.when == "call" and report.passed):
            refused = ("support", NO) in item.user_properties
            cells[place] = NO if report.failed or refused else cells.get(place, YES)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    ran, committed = session.config.stash.get(OUTCOMES, {}), read(PAGE)
    if session.config.getoption("--support-table"):
        write(PAGE, committed | ran)
        return
    off = [f"{case}, {column}" for (case, column), cell in ran.items() if committed.get((case, column)) != cell]
    if off:
        say = session.config.get_terminal_writer()
        say.line(f"\ndocs/families.md says otherwise of: {'; '.join(off)}. Write it with --support-table.", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def read(page: Path) -> Cells:
    """The cells of the committed table."""
    inside = page.read_text().split(BEGIN)[1].split(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in inside.strip().splitlines()]
    header, _, *body = rows or [[], []]
    return {(row[0], column): cell for row in body for column, cell in zip(header[1:], row[1:], strict=True) if cell}


def write(page: Path, cells: Cells) -> None:
    """Put the table of these cells in the place of the committed one."""
    before, rest = page.read_text().split(BEGIN)
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for case in sorted({case for case, _ in cells}, key=str.casefold):
        lines.append(f"| {case} | {' | '.join(cells.get((case, column), UNKNOWN) for column in COLUMNS)} |")
    page.write_text(f"{before}{BEGIN}\n{chr(10).join(lines)}\n{END}{rest.split(END)[1]}")
