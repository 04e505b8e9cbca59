"""Try recipes and learners of knowledge injection on one's own documents, and report which works best.

python scripts/compare_injection.py --config experiment.yaml

Runs that are finished are not repeated, interrupted ones go on: repeat the command after an interruption. What is in an
experiment file is what `--help` lists.
"""

import shlex
import sys
from pathlib import Path

from lit_llama.command_line import progress, run, stop
from lit_llama.errors import InputError
from lit_llama.experiment_runs import Scripts
from lit_llama.injection.comparison import Experiment, carry_out, check, check_keys, controls, first_wave
from lit_llama.injection.comparison_report import aligned, cells_table, write_report
from lit_llama.injection.comparison_results import collect, summarise, verdict

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Scripts(ROOT / "finetune" / "inject.py", ROOT / "scripts" / "evaluate_knowledge.py")


def main(experiment: Experiment) -> None:
    check(experiment)
    if experiment.action == "plan":
        sweeps = first_wave(experiment)
        for planned in (*controls(experiment), *(one for attempts in sweeps.values() for one in attempts)):
            print(planned.name)
        progress(f"then, with the options that do best, {', '.join(f'seed {seed}' for seed in experiment.seeds[1:])}")
        return
    runs = carry_out(experiment, SCRIPTS)
    results = summarise(experiment, collect(experiment, runs))
    write_report(results, shlex.join(sys.orig_argv))
    print("\n".join([*aligned(cells_table(results)), "", *verdict(results)]))
    progress(f"wrote {experiment.out_dir / 'report.html'}, report.md and results.jsonl")


if __name__ == "__main__":
    try:
        for name, value in zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True):
            if name == "--config" or name.startswith("--config="):
                check_keys(Path(name.partition("=")[2] or value))
    except InputError as error:
        stop(error, 2)
    run(main)
