"""Data sets by name, arrays and image files, and the map between pixel levels and model values."""
