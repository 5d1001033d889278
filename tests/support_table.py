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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-table", action="store_true", help="write the table of docs/families.md from what ran")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # where several processes run tests, one of them hears of all
        config.pluginmanager.register(_Outcomes(config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Say in a test's report which cells it fills."""
    report = yield
    if report.failed or (report.when == "call" and report.passed):
        cell = NO if report.failed or ("support", NO) in item.user_properties else YES
        for marker in item.iter_markers("support"):
            assert marker.args[0] in COLUMNS, f"the table has no column {marker.args[0]!r}"
            case = item.callspec.params["case"]  # type: ignore[attr-defined]
            report.user_properties = [*report.user_properties, ("cell", (case, marker.args[0], cell))]
    return report


class _Outcomes:
    """What the reports said; at the end it is written, or compared with what is committed."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.cells = config, Cells()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == "cell":
                case, column, cell = value
                self.cells[case, column] = cell if cell == NO else self.cells.get((case, column), cell)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        committed = read(PAGE)
        if self.config.getoption("--support-table"):
            write(PAGE, committed | self.cells)
            return
        off = [
            f"{case}, {column}" for (case, column), cell in self.cells.items() if committed.get((case, column)) != cell
        ]
        if off:
            say = session.config.get_terminal_writer()
            say.line(
                f"\ndocs/families.md says otherwise of: {'; '.join(off)}. Write it with --support-table.", red=True
            )
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
