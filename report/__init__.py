"""From finished runs to tables, figures and one page."""

import experiment  # noqa: F401 -- before all else
