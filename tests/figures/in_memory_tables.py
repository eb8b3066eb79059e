"""Tables of claims that are given as data frames."""

from pathlib import Path

import pandas as pd

from figures.claims.measures import Tables


class InMemoryTables(Tables):
    """Tables by name."""

    def __init__(self, **tables: pd.DataFrame) -> None:
        super().__init__(Path())
        self._read = tables
