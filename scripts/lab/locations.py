"""Add scripts/ to the import path, so that commands in scripts/lab can import dsv4 and nano.

Python adds only the folder of the script that it runs, here scripts/lab.
"""

from __future__ import annotations

import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]
NANO = SCRIPTS / "nano" / "checkpoint"
NEW = SCRIPTS.parent / ".toolchain" / "new" / "bin" / "python"  # of the stack that serves

sys.path.insert(0, str(SCRIPTS))
