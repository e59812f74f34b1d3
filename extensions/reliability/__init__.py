"""Trials of faults on litlora, in real processes: crashes, power cuts, full disks, altered files, signals. See README.md.

They stand on what the tests stand on (`tests/crashing_disk.py`, `tests/talkers.py`), so they run in a clone of the repository.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))
