"""Hide torchvision from transformers, in a runtime's Python.

The package index has a torchvision for Linux that does not match a torch without CUDA. With it,
importing transformers' image processing fails, and mlx-vlm with it, although no images are used.
"""

from __future__ import annotations

import sys


def hide() -> None:
    """Make import and find_spec fail for torchvision, unless it has been imported."""
    sys.modules.setdefault("torchvision", None)
