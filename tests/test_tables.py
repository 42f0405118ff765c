"""The tables of README.md and docs/ are those that benchmarks/tables.py makes from benchmarks/results/."""

import pytest

from benchmarks.tables import DOCUMENTS, TABLES, filled


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path):
    assert filled(path.read_text()) == path.read_text(), "run python -m benchmarks.tables"


def test_every_table_is_shown():
    text = "".join(path.read_text() for path in DOCUMENTS)
    assert all(f"<!-- table: {name} -->" in text for name in TABLES)
