"""Evidence about the GPU kernels from a machine without a GPU: registers, spills, vector widths, and, where the PTX
simulator `ptxsim` can be imported, counted memory traffic and which limit of an H100 binds.

    python bench/gpu_static.py --backend cuda|triton [--json]

prints one row for each kernel, architecture, dtype and vocabulary; the fields are those of `_gpu_row.Row`. A lower
bound is no prediction: latency and occupancy are not in it, nor is any time measured on a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util

from gpu.row import as_json, as_table

BACKENDS = {"cuda": "gpu.cuda", "triton": "gpu.triton"}
"""Backend → module whose `rows(simulate)` yields its rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    simulate = importlib.util.find_spec("ptxsim") is not None
    rows = list(importlib.import_module(BACKENDS[options.backend]).rows(simulate))
    print(as_json(rows) if options.json else as_table(rows))


if __name__ == "__main__":
    main()
