"""The version of this package, for the build and for the files that it writes.

It is a number here, not asked of the installed distribution: there is none where a source tree is only on the path.
"""

__all__ = ["VERSION"]

VERSION = "0.2.0"
