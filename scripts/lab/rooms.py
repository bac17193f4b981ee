"""Where a command of the laboratory finds the house: importing this lets it import dsv4 and nano.

Python puts the folder of the script that it runs on its path, scripts/lab here, in this project's
.venv and in a runtime's Python alike; the rooms lie beside that folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]
NANO = SCRIPTS / "nano" / "checkpoint"
NEW = SCRIPTS.parent / ".toolchain" / "new" / "bin" / "python"  # of the stack that serves

sys.path.insert(0, str(SCRIPTS))
