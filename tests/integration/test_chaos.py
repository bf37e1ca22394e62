"""The short form of scripts/endurance/chaos.py."""

import re
import subprocess
import sys
from pathlib import Path

CHAOS = Path(__file__).parents[2] / "scripts/endurance/chaos.py"


def test_twenty_stops_leave_no_trace(tmp_path: Path) -> None:
    command = [sys.executable, str(CHAOS), "--kills", "20", "--seed", "7", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    said = re.search(r"(\d+) stops in \d+ trials, 0 failures", done.stdout)
    assert said and int(said.group(1)) == 20
