"""Runs killed with -9 at random moments: each goes on, and every loss equals an uninterrupted run's, bit for bit.

    python tests/bench/random_kills.py [--runs 20] [--seed 0]
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from jaxgen.training.metrics import read  # noqa: E402
from tests.training.test_kill import EXPERIMENT  # noqa: E402


def losses(directory: Path) -> list[tuple]:
    """As the test's, without a line that is being written."""
    return [(n["step"], k, v) for n in read(directory) for k, v in n.items() if k.endswith("/loss")]


def start(place: Path, name: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxgen.cli.main", "train", "experiment.py", "--steps", "120", "--run-dir", name]
    return subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, same = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        text = "".join(f"{i} is {i * i} squared, and {i**3} cubed.\n" for i in range(400))
        (place / "text.txt").write_text(text)
        (place / "experiment.py").write_text(EXPERIMENT.format(path=str(place / "text.txt")))
        start(place, "whole").communicate()
        wanted = losses(place / "whole")
        for i in range(arguments.runs):
            name, step, later = f"run{i}", draw.randrange(118), draw.uniform(0, 0.3)
            process, metrics = start(place, name), place / name / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and len(losses(place / name)) > step):
                time.sleep(0.01)
            time.sleep(later)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            _, said = start(place, name).communicate()
            equal = losses(place / name) == wanted
            same += equal
            told = [line for line in said.splitlines() if "resumed" in line or "finished" in line] or ["from the start"]
            verdict = "equal" if equal else "DIFFERENT"
            print(f"{i + 1}: killed {later:.2f} s after step {step}, {told[0]}: {verdict}", flush=True)
    print(f"{same} of {arguments.runs} equal")
    sys.exit(same != arguments.runs)


if __name__ == "__main__":
    main()
