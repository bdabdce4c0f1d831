"""Checkpoints of the public codes of score SDEs, QCSBM, NCSN and NCSNv2, read into our networks."""

from models.published.checkpoint import PublicCheckpoint, convert_public_checkpoint
from models.published.names import official_names

__all__ = ["PublicCheckpoint", "convert_public_checkpoint", "official_names"]
