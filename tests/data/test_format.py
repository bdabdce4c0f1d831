"""Exact round trips between levels and model values; mirroring that belongs to the sample."""

from __future__ import annotations

import json

import pytest
import torch

from data import DataFormat, TensorSplit
from data.format import random_flip, scale, to_pixels, to_unit_interval, unscale
from experiment.randomness import SampleGenerators, uniform


@pytest.mark.parametrize("num_levels", [2, 17, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_survive_the_round_trip(num_levels, dtype):
    """Every level, with noise from everywhere in [0, 1) including both ends."""
    levels = torch.arange(num_levels, dtype=torch.uint8)[:, None]
    x = to_unit_interval(levels, num_levels)
    assert x.dtype == torch.float32 and x[0] == 0 and x[-1] == 1
    assert torch.allclose(x.double() * (num_levels - 1), levels.double(), rtol=0, atol=1e-4)
    assert torch.equal(to_pixels(x, num_levels, dequantized=False), levels)
    below_one = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    noise = torch.rand(num_levels, 1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    noise[:, 0], noise[:, 1], noise[:, 2] = 0, below_one, torch.finfo(dtype).tiny
    x = to_unit_interval(levels.expand_as(noise), num_levels, dequantization=noise)
    assert x.dtype == dtype
    # Ten roundings of (k + u)/L, computed in float64.
    exact = (levels.double() + noise.double()) / num_levels
    assert (x - exact).abs().max() < 10 * torch.finfo(dtype).eps
    assert torch.equal(to_pixels(x, num_levels, dequantized=True), levels.expand_as(noise))
    for centered in (False, True):
        assert torch.equal(to_pixels(unscale(scale(x, centered), centered), num_levels, True), levels.expand_as(noise))


def test_pixels_are_clipped_and_cells_have_the_right_widths():
    outside = torch.tensor([-0.4, 0.0, 1.0, 1.7])
    for dequantized in (False, True):
        assert to_pixels(outside, 17, dequantized).tolist() == [0, 0, 16, 16]
        assert to_pixels(outside, 256, dequantized).dtype == torch.uint8
    x = (torch.arange(16 * 17 * 10) + 0.5) / (16 * 17 * 10)  # an even covering of [0, 1]
    assert torch.bincount(to_pixels(x, 17, True).long()).tolist() == [160] * 17  # cells of equal width
    assert torch.bincount(to_pixels(x, 17, False).long()).tolist() == [85] + [170] * 15 + [85]  # nearest of 0, 1/16, …


def test_scale():
    x = torch.tensor([0.0, 0.25, 1.0])
    assert scale(x, True).tolist() == [-1.0, -0.5, 1.0]
    assert torch.equal(scale(x, False), x)
    assert torch.equal(unscale(scale(x, True), True), x) and torch.equal(unscale(x, False), x)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dequantized", [False, True])
def test_an_image_format_is_the_way_to_the_model_and_back(centered, dequantized):
    levels = (torch.arange(3 * 16) % 17).to(torch.uint8).reshape(3, 1, 4, 4)
    images = DataFormat.of(TensorSplit("x", levels, None, num_levels=17), centered=centered, dequantized=dequantized)
    assert DataFormat.from_dict(json.loads(json.dumps(images.as_dict()))) == images
    assert (images.shape, images.dimension, images.num_classes) == ((1, 4, 4), 16, None)
    streams = ((0, "x"), range(3))
    noise = uniform(levels.shape, SampleGenerators(*streams))
    expected = to_unit_interval(levels, 17, dequantization=noise if dequantized else None)
    x = images.to_model(levels, SampleGenerators(*streams))
    assert torch.equal(x, scale(expected, centered)) and torch.equal(images.to_data(x), levels)
    # Likelihoods are of dequantised levels, whatever the model learned.
    x = images.to_model(levels, SampleGenerators(*streams), dequantize=True)
    assert torch.equal(x, scale(to_unit_interval(levels, 17, dequantization=noise), centered))
    # Without random numbers, the middle of the cell (k + ½)/L.
    middle = (levels + 0.5) / 17 if dequantized else levels / 16
    torch.testing.assert_close(unscale(images.to_model(levels), centered), middle)
    # Samples, or levels of another set, would be taken for other images.
    for wrong in (levels / 16, levels + 1, levels.int() - 1, levels * float("nan")):
        with pytest.raises(ValueError, match="in place of levels, integers from 0 to 16;"):
            images.to_model(wrong)
    assert torch.equal(images.to_model(levels.float()), images.to_model(levels))
    # uint8 does not hold the number of its own levels.
    full = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    of_bytes = DataFormat((1, 1, 2), 256, None, centered, dequantized)
    assert torch.equal(of_bytes.to_model(full), of_bytes.to_model(full.int()))
    with pytest.raises(ValueError, match="65537 levels: allowed are 2 to 65536"):
        DataFormat((1, 4, 4), 2**16 + 1, None, centered, dequantized)


def test_random_flip_mirrors_about_half_the_images():
    images = torch.arange(4000 * 2 * 3 * 5).reshape(4000, 2, 3, 5)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == torch.from_numpy(images.numpy()[..., ::-1].copy())).flatten(1).all(1)
    assert (same ^ mirrored).all()
    # Binomial with n = 4000, p = ½: standard error 0.0079; four of them.
    assert abs(mirrored.double().mean() - 0.5) < 4 * 0.5 / 4000**0.5
    assert flipped.dtype == images.dtype


def test_random_flip_belongs_to_the_sample():
    images = torch.randint(0, 256, (64, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together = random_flip(images, SampleGenerators((0, "flip"), range(64)))
    apart = [
        random_flip(images[i : i + 7], SampleGenerators((0, "flip"), range(i, min(i + 7, 64)))) for i in range(0, 64, 7)
    ]
    assert torch.equal(together, torch.cat(apart)) and not torch.equal(together, images)
