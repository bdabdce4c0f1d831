"""What the tests of data sets share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import load_dataset


def refused(error: type[Exception], *fragments: str, **arguments) -> None:
    """The loader raises this error with all fragments in a message of one line."""
    with pytest.raises(error) as caught:
        load_dataset(**arguments)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
