"""What the tests of the assumptions share."""

import pytest


@pytest.fixture(autouse=True)
def short_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the walk over the manifold: the twins here are found without the rest."""
    monkeypatch.setattr("manifold_sde.verification.subject._WALK", (4, 0.5))
