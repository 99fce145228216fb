"""fastalign: fused, compiled losses for aligning language models with human preferences.

The names are those of `fastalign.api`. They are imported, and torch's operators registered, at once where torch is
loaded already, and else when the first name is used: so the command line answers without torch. `import fastalign.ops`
registers the operators in any case.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# The kernels' Python lies in another folder of the sources, and beside this file once they are installed.
if not Path(__file__).with_name("kernels").is_dir() and importlib.util.find_spec("fastalign.kernels") is None:
    raise ImportError(
        f"{Path(__file__).parent} holds the sources of fastalign, which are not installed: run `pip install .` in "
        f"{Path(__file__).parents[1]} and start Python in another folder (or build beside the sources: CONTRIBUTING.md)"
    )

from .utils import moved as _moved
from .utils.version import __version__ as __version__

if TYPE_CHECKING:
    from .api import *  # noqa: F403
    from .api import __all__ as __all__

_moved.install()
importlib.import_module(".utils.environment", __name__)  # refuses what an environment variable must not be


def __getattr__(name: str) -> object:
    """A module of the package, imported alone, or a name of `api`."""
    if not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f".{name}", __name__)
    if not name.startswith("_") or name == "__all__":  # nor a compiled module that was not built
        names = vars(importlib.import_module(".api", __name__))
        if name in (*names.get("__all__", ()), "__all__"):  # which is not there while `api` is being imported
            globals()[name] = names[name]
            return names[name]
        return _moved.renamed(__name__, names, stacklevel=3)(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module(".api", __name__).__all__})


if "torch" in sys.modules:
    importlib.import_module(".api", __name__)
