"""Every figure is fit to be printed, across a page and in one column of it."""

import pytest

from figures import style
from figures.registry import DATA, figure_module, figure_names, read_table, table_path
from tests.figures.print_checks import print_problems


@pytest.mark.parametrize("width", [style.PAGE_WIDTH, style.COLUMN_WIDTH], ids=["page", "column"])
@pytest.mark.parametrize("name", figure_names())
def test_a_reviewer_of_the_printed_figure_has_no_objection(name: str, width: float) -> None:
    table = read_table(table_path(name, DATA))
    with style.style_context():
        figure = figure_module(name).draw(table, width)
        problems = print_problems(figure, table, width)
    assert not problems, "\n".join(problems)
