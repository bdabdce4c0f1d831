"""How many steps which forward process needs: exact Wasserstein distances for Gaussian data."""
