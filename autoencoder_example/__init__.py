"""Section 6: a one-layered autoencoder that becomes conservative without tied weights."""
