"""Section 3.2 of the QCSBM paper: unconstrained, conservative and quasi-conservative models of points in the plane."""

import experiment  # noqa: F401 -- before all else
