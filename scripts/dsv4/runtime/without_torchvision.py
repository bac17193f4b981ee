"""Hide torchvision from transformers, in a runtime's Python.

The package index has a torchvision for Linux that does not fit a torch without CUDA; then
importing transformers' image processing fails, and mlx-vlm with it, although nothing here needs
pictures. For modules that run in that Python.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys

HIDDEN = "torchvision"


def hide() -> None:
    """Let every later question for torchvision be answered with no; what is imported stays."""
    asked = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        return None if name.partition(".")[0] == HIDDEN else asked(name, package)

    importlib.util.find_spec = find_spec
    sys.modules.setdefault(HIDDEN, None)
