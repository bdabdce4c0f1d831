"""A classifier of noised images, log p(c | x_t, t), for classifier guidance (Dhariwal and Nichol, NeurIPS 2021).

The encoder half of the U-Net: BigGAN blocks that are given the noise level, with means over 2×2 pixels between levels,
then a linear layer of all that is left: at much noise a class shows in where an image is bright, which a mean over all
pixels would forget. Its input is x_t/√(α² + σ²), of one size at all times, and its label σ/α, so that one network
serves every SDE.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.layers import BigGANBlock, Downsample, FourierEmbedding, conv3x3, dense, group_norm
from sde_lib import SDE, expand


class NoiseConditionalClassifier(nn.Module):
    """Logits (B, K) from x_t (B, C, H, W) and t (B,).

    Args:
        sde: the forward process.
        image_shape: (C, H, W); H and W divisible by 2^(levels − 1).
        num_classes: K.
        nf, ch_mult: width nf·ch_mult[i] on level i.
        num_res_blocks: blocks per level.
        dropout: probability, in every block.

    Raises:
        ValueError: sizes that do not fit.
    """

    def __init__(
        self,
        sde: SDE,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        nf: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        shrunk = 2 ** (len(ch_mult) - 1)
        if height % shrunk or width % shrunk:
            raise ValueError(
                f"classifier.ch_mult={tuple(ch_mult)}: {len(ch_mult)} levels need a size divisible by {shrunk}, the "
                f"images have {height}x{width} pixels"
            )
        self.sde = sde
        activation = nn.SiLU()
        self.embedding = FourierEmbedding(nf, scale=1.0)
        self.time_mlp = nn.Sequential(dense(self.embedding.out_features, 4 * nf), activation, dense(4 * nf, 4 * nf))
        options = dict(activation=activation, temb_features=4 * nf, dropout=dropout, init_scale=1.0, skip_rescale=True)
        self.stem = conv3x3(channels, nf)
        self.blocks = nn.ModuleList()
        channels = nf
        for level, multiplier in enumerate(ch_mult):
            if level:
                mean = Downsample(channels, channels, with_conv=False)
                self.blocks.append(BigGANBlock(channels, channels, resample=mean, **options))
            for _ in range(num_res_blocks):
                self.blocks.append(BigGANBlock(channels, nf * multiplier, **options))
                channels = nf * multiplier
        self.head = nn.Sequential(group_norm(channels), activation)
        self.logits = dense(channels * (height // shrunk) * (width // shrunk), num_classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, std = self.sde.mean_coefficient(t), self.sde.std(t)
        temb = self.time_mlp(self.embedding((std / alpha).to(x.dtype)))
        h = self.stem(x / expand((alpha**2 + std**2).sqrt(), x))
        for block in self.blocks:
            h = block(h, temb)
        return self.logits(self.head(h).flatten(1))

    def log_probs(self, x: Tensor, t: Tensor) -> Tensor:
        """log p(· | x_t, t), (B, K)."""
        return torch.log_softmax(self(x, t).float(), dim=1)
