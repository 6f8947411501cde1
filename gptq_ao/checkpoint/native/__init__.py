"""The format of this package."""
