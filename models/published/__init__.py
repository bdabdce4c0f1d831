"""Models of other projects: checkpoints of the public codes of score SDEs, QCSBM, NCSN and NCSNv2, read into our
networks; folders of diffusers; networks by import path."""

from models.published.checkpoint import PublicCheckpoint, convert_public_checkpoint
from models.published.foreign import Foreign, read_foreign
from models.published.names import official_names

__all__ = ["Foreign", "PublicCheckpoint", "convert_public_checkpoint", "official_names", "read_foreign"]
