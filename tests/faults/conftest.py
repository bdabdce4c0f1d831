"""What the tests of faults share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folders of programs that were let run to their end (``programs.finish``)."""
    return tmp_path_factory.mktemp("finished")
