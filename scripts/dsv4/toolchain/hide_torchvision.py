"""Hide torchvision from transformers, in a runtime's Python.

The package index has a torchvision for Linux that does not fit a torch without CUDA; then
importing transformers' image processing fails, and mlx-vlm with it, although nothing here needs
pictures. For modules that run in that Python.
"""

from __future__ import annotations

import sys


def hide() -> None:
    """Let it be found no more, by an import and by find_spec alike; what is imported stays."""
    sys.modules.setdefault("torchvision", None)
