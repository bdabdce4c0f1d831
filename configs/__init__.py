"""Experiments as data: each file has ``get_config`` and states its launch command and expected result."""
