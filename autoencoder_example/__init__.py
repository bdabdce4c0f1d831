"""Section 6: a one-layered autoencoder that becomes conservative without tied weights."""

import experiment  # noqa: F401 -- before all else
