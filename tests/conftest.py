"""What every test shares: one thread, fixed global seeds, small networks."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from models.unet import UNet

torch.set_num_threads(1)

SMALL_UNET = dict(
    image_size=8,
    num_channels=1,
    centered=False,
    nf=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(4,),
    dropout=0.0,
    nonlinearity="swish",
    conditional=True,
    embedding_type="fourier",
    fourier_scale=16.0,
    resblock_type="biggan",
    resamp_with_conv=True,
    fir=True,
    fir_kernel=(1, 3, 3, 1),
    skip_rescale=True,
    progressive="none",
    progressive_input="residual",
    progressive_combine="sum",
    init_scale=1.0,
    num_classes=0,
)
"""NCSN++ in small. init_scale 1 instead of 0, so that no branch is negligible."""


SHARING = (
    *("test_benchmarks.py", "test_classifier.py", "test_digits.py", "test_run_conditional.py", "test_run_lib.py"),
    *("test_sample_evaluation.py", "test_several_processes.py", "test_tfgan.py", "test_tutorial_example.py"),
)
"""Files whose tests share what takes long to compute: each of them runs in one process."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log) -> object:
    """With -n: these files first, then all other tests one by one. (--dist=loadgroup does nothing with pytest 9.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith(SHARING) else nodeid

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """What has been imported is no garbage: accelerate, and what measures memory, look through all of it every time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def forget_accelerator() -> Iterator[Callable[[], None]]:
    """accelerate keeps its settings for the life of the process: it forgets them where a test calls this, and has them
    again after the test."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = (PartialState, AcceleratorState, GradientState)
    before = [dict(state._shared_state) for state in states]

    def forget() -> None:
        for state in states:
            state._shared_state.clear()

    yield forget
    for state, settings in zip(states, before, strict=True):
        state._shared_state.clear()
        state._shared_state.update(settings)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> tuple[Path, str]:
    """A file of random weights of torch-fidelity's Inception, and its SHA-256: right in shape and in nothing else.

    The scale of the weights keeps features of order one, so that images can be told apart.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments, **options):
            pass

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    network = Untrained("inception", ["2048", "logits_unbiased"], path)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in network.state_dict().items():
        if tensor.ndim > 1:
            tensor = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
        state[name] = tensor
    torch.save(state, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def small_unet():
    """Builds a small U-Net in evaluation mode; every option can be given."""

    def build(*, dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> UNet:
        torch.manual_seed(seed)
        return UNet(**(SMALL_UNET | options)).to(dtype).eval()

    return build
