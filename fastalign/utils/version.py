"""Versions, where nothing heavy is imported."""

__version__ = "0.1.0"


def version_of(package: str) -> str | None:
    """Version of an installed package, None where it is not."""
    import importlib.metadata  # here, as `fastalign --help` needs none of it

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
