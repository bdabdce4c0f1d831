"""Schrödinger bridges between two distributions, learned: diffusion Schrödinger bridge (IPF) and its matching (IMF)."""

import experiment  # noqa: F401 -- before all else
