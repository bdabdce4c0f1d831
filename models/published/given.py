"""A network that exists already in somebody's code: a function of x and a label, or a torch.nn.Module."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import torch
from torch import Tensor, nn

from experiment.registry import resolve


class Given(nn.Module):
    """What an import path names, as a network h(x, label): a module, a class of modules that needs no arguments, or a
    function such as the velocity u(x, t) of flow matching.

    Raises:
        ValueError: there is no such thing, or a class that needs arguments.
    """

    def __init__(self, function: str) -> None:
        super().__init__()
        found = resolve(function, {}, "--model")
        if inspect.isclass(found):
            try:
                found = found()
            except TypeError as error:
                raise ValueError(f"--model={function}: {error}; give the name of one that has been made") from error
        self.function = found
        self.device_of = nn.Parameter(torch.empty(0), requires_grad=False)  # a function has no weights

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.function(x, label)


def fields(path: str) -> dict[str, object]:
    """What a config says of the network that an import path names, besides what it predicts of which process."""
    module = inspect.getmodule(resolve(path, {}, "--model")) or __import__(path.partition(":")[0])
    source = getattr(module, "__file__", None)
    digest = hashlib.blake2b(Path(source).read_bytes() if source else b"", digest_size=16).hexdigest()
    return {"model.name": f"{__name__}:{Given.__name__}", "model.function": path, "model.source": digest}
