"""Does quasi-conservativeness help? See the README of this folder."""

import experiment  # noqa: F401 -- before all else
