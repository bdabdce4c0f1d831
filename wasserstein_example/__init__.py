"""How many steps which forward process needs: exact Wasserstein distances for Gaussian data."""

import experiment  # noqa: F401 -- before all else
