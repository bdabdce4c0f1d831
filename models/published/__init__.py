"""Models of other projects: checkpoints of the public codes of score SDEs, QCSBM, NCSN and NCSNv2, read into our
networks; folders of diffusers; pickles of EDM; networks by import path. And models of ours for others."""

from models.published.checkpoint import PublicCheckpoint, convert_public_checkpoint, public_checkpoint
from models.published.exported import model_card, write_exported
from models.published.foreign import read_published
from models.published.names import official_names

__all__ = [
    "PublicCheckpoint",
    "convert_public_checkpoint",
    "model_card",
    "official_names",
    "public_checkpoint",
    "read_published",
    "write_exported",
]
