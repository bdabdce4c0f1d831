"""The U-Net of DDPM, the ancestor of DDPM++ and NCSN++: theirs with all that they added taken out again.

Residual blocks whose branches are added without rescaling, convolutions of stride 2 and repeated pixels instead of
blurs, a positional embedding of the time label, no pyramids of images, and last layers that start at zero.

Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models" (NeurIPS 2020), Appendix B, as score_sde_pytorch
has it: in the decoder with attention once per resolution, not after every block.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.unet import UNet

__all__ = ["DDPM"]


class DDPM(UNet):
    """The noise-conditional U-Net of DDPM; arguments and errors are the U-Net's."""

    def __init__(
        self,
        *,
        image_size: int,
        num_channels: int,
        centered: bool,
        nf: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float,
        nonlinearity: str,
        conditional: bool,
        resamp_with_conv: bool,
    ) -> None:
        super().__init__(
            image_size=image_size,
            num_channels=num_channels,
            centered=centered,
            nf=nf,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            attn_resolutions=attn_resolutions,
            dropout=dropout,
            nonlinearity=nonlinearity,
            conditional=conditional,
            embedding_type="positional",
            fourier_scale=0.0,
            resblock_type="ddpm",
            resamp_with_conv=resamp_with_conv,
            fir=False,
            fir_kernel=(),
            skip_rescale=False,
            progressive="none",
            progressive_input="none",
            progressive_combine="sum",
            init_scale=0.0,
        )
