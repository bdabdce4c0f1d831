"""Experiments as data: each file has ``get_config`` and states its launch command and expected result."""

from configs.checks import check
from configs.defaults import FIELDS, base_config
from configs.fields import options

__all__ = ["FIELDS", "base_config", "check", "options"]
