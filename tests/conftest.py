"""What several test files are given."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters import write_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, float]]:
    """Two weighted adapters of every kind of layer; nobody may change them."""
    return write_pair(tmp_path_factory.mktemp("pair"))
