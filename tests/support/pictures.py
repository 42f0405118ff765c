"""What a matplotlib figure shows, before it is a file."""

import pytest
from matplotlib.figure import Figure


def record_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return a list to which every figure is added that is written to a file from now on."""
    figures, save = [], Figure.savefig

    def savefig(figure: Figure, *args, **more) -> None:
        figures.append(figure)
        save(figure, *args, **more)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures
