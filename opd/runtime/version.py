"""Version of the installed distribution; pyproject.toml is its only source."""

from diagnostics.io.provenance import DISTRIBUTION, package_version

__version__ = package_version(DISTRIBUTION)
