"""From score matching to conditional generation: a tutorial on score-based models, on densities known exactly."""

import experiment  # noqa: F401 -- before all else
