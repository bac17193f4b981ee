"""The stacks that the recipe is run on: who serves a bundle, in which pinned versions.

Each has a requirements file scripts/stacks/NAME.txt, from which `make matrix` builds a venv. A new
version is a new file and a new line here.
"""

from __future__ import annotations

from dataclasses import dataclass

LOADER, MODEL = "load_jangtq.patch", "mlx_model.patch"


@dataclass(frozen=True)
class Stack:
    """One row of the matrix.

    requirements: name of the pinned file in scripts/stacks; how: logits.py's way into the runtime;
    served: by vMLX's server, else asked through generate.py; patches: applied to its jang_tools;
    packages: the versions that identify it in somebody's toolchain.
    """

    name: str
    requirements: str
    how: str
    served: bool
    patches: tuple[str, ...]
    packages: dict[str, str]


STACKS = (
    Stack("old", "old", "loader", True, (LOADER, MODEL),
          {"vmlx": "1.3.97", "jang": "2.5.9", "mlx": "0.31.2", "mlx-lm": "0.31.2"}),
    Stack("old, loader unpatched", "old", "loader", True, (MODEL,),
          {"vmlx": "1.3.97", "jang": "2.5.9", "mlx": "0.31.2", "mlx-lm": "0.31.2"}),
    Stack("old, jang 2.5.8", "old-2.5.8", "loader", True, (LOADER, MODEL),
          {"vmlx": "1.3.97", "jang": "2.5.8", "mlx": "0.31.2", "mlx-lm": "0.31.2"}),
    Stack("old, jang 2.5.8, loader unpatched", "old-2.5.8", "loader", True, (MODEL,),
          {"vmlx": "1.3.97", "jang": "2.5.8", "mlx": "0.31.2", "mlx-lm": "0.31.2"}),
    Stack("new", "new", "loader", True, (),
          {"vmlx": "1.6.81", "jang": "2.5.50", "mlx": "0.32.4", "mlx-lm": "0.31.3"}),
    Stack("vlm", "vlm", "mlx-vlm", False, (),
          {"mlx-vlm": "0.7.10", "mlx": "0.32.4"}),
    Stack("lm", "lm", "mlx-lm", False, (),
          {"mlx-lm": "0.32.2", "jang": "2.5.50", "mlx": "0.32.4"}),
)  # fmt: skip
