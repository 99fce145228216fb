"""Kernels of fastalign: fused token statistics, one file per backend. Internal: call them through `fastalign.ops`."""
