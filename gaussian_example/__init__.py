"""Section 3.1: two scores of equal error, one conservative and one not."""

import experiment  # noqa: F401 -- before all else
