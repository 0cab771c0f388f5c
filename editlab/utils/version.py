"""The version of editlab; every module may import it without importing the rest."""

__version__ = "1.0.0"
