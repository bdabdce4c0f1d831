"""Does quasi-conservativeness help? See the README of this folder."""
