"""Trainings that several processes do together, one after the other; torchrun starts it for test_distributed.py.

python distributed_worker.py runs.json, where runs.json is a list of [script, {option: value}].
"""

import importlib.util
import json
import sys
from pathlib import Path

from lit_llama.command_line import run

ROOT = Path(__file__).parent.parent


def run_all(specification: Path) -> None:
    """Run the `main` of each script as its command line would."""
    for script, options in json.loads(specification.read_text()):
        place = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
        module = sys.modules[place.name] = importlib.util.module_from_spec(place)
        place.loader.exec_module(module)
        run(module.main, [f"--{name}={value}" for name, value in options.items()])


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
