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

from tests.training.test_kill import EXPERIMENT, losses  # noqa: E402


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
        start(place, "cold").communicate()  # compiles, and tokenizes
        begin = time.monotonic()
        start(place, "whole").communicate()
        seconds, wanted = time.monotonic() - begin, losses(place / "whole")
        for i in range(arguments.runs):
            name, moment = f"run{i}", draw.uniform(0.4, 1.0) * seconds
            process = start(place, name)
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            _, said = start(place, name).communicate()
            equal = losses(place / name) == wanted
            same += equal
            told = [line for line in said.splitlines() if "resumed" in line or "finished" in line] or ["from the start"]
            print(f"{i + 1}: killed after {moment:.1f} s, {told[0]}: {'equal' if equal else 'DIFFERENT'}", flush=True)
    print(f"{same} of {arguments.runs} equal")
    sys.exit(same != arguments.runs)


if __name__ == "__main__":
    main()
