"""Dropout whose masks belong to a sample: not to the batch, the process or the device.

Number j of a sample stays or goes by a hash of j under the sample's key, two random integers a and b of 64 bits:

    it goes if  a·mix(j) + b mod 2⁶⁴  <  p·2⁶⁴.

Multiply-shift hashing is pairwise independent; mix, a fixed scrambling of j, is there because a hash that is linear
in j would make patterns of neighbours. Under the same keys a second evaluation sees the same network, which is what
the quasi-conservative loss needs, when it takes its probes in chunks, and recomputation.

Sources: Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (JMLR 2014); Dietzfelbinger, "Universal hashing and
k-wise independent random variables via integer arithmetic without primes" (STACS 1996) for the hash.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from experiment.randomness import mix32, random_bits

__all__ = ["Dropout", "set_dropout_keys"]


class Dropout(nn.Module):
    """In training, each number of (B, C, H, W) becomes 0 with probability p and is else divided by 1 − p.

    Attributes:
        keys: int64 (B, 2), used until others are set; None: keys from torch's global stream, others at every call.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor(x)
        return x if factor is None else x * factor

    def factor(self, x: Tensor) -> Tensor | None:
        """What the numbers of x (B, C, H, W) are multiplied by, 0 or 1/(1 − p); None where that is 1 for all."""
        if not self.training or self.p == 0:
            return None
        keys = random_bits((len(x), 2), device=x.device) if self.keys is None else self.keys
        channels, height, width = x.shape[1:]
        # In the order of channels-last memory, which is that of x.
        position = torch.arange(height * width * channels, device=x.device).view(height, width, channels)
        multiplier, offset = keys[:, :, None, None, None].unbind(1)
        bits = (multiplier * mix32(position)).add_(offset)
        # The bits are those of a signed integer, between −2⁶³ and 2⁶³. As a factor, because torch.where is slow, and
        # slower still to differentiate.
        factor = (bits >= round((self.p - 0.5) * 2**64)).to(x.dtype).mul_(1 / (1 - self.p))
        return factor.permute(0, 3, 1, 2)


def set_dropout_keys(layers: Sequence[Dropout], keys: Tensor) -> None:
    """Give each layer its keys for the batch that comes next: int64 (B, layers, 2)."""
    for layer, own in zip(layers, keys.unbind(1), strict=True):
        layer.keys = own
