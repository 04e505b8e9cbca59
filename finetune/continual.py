"""Learn tasks one after the other by several strategies, and report what each of them forgets and costs.

python finetune/continual.py --config experiment.yaml

Runs that are finished are not repeated, interrupted ones go on: repeat the command after an interruption. What is in an
experiment file is what `--help` lists.
"""

import shlex
import shutil
import sys
from pathlib import Path

from lit_llama.command_line import progress, run
from lit_llama.continual import alone_in, carry_out
from lit_llama.continual_experiment import ContinualExperiment, check, planned_runs, prepare
from lit_llama.continual_report import collect, main_table, write_report
from lit_llama.experiment_runs import Scripts, directory, execute
from lit_llama.files import read_json, write_json
from lit_llama.injection.comparison_report import aligned

SCRIPTS = Scripts(train=Path(__file__).resolve(), evaluate=Path(__file__).resolve())


def main(experiment: ContinualExperiment) -> None:
    if experiment.out is not None:
        with alone_in(experiment.out.parent):
            write_json(experiment.out, carry_out(experiment))
        return
    check(experiment)
    if experiment.action == "plan":
        print("\n".join(planned.name for runs in planned_runs(experiment) for planned in runs))
        return
    experiment = prepare(experiment)
    waves = planned_runs(experiment)
    for runs in waves:  # what others begin with comes first
        for planned in runs:
            place = directory(experiment, planned)
            if experiment.overwrite and (place / "run.json").is_file():
                if read_json(place / "run.json") != planned.identity:
                    old = place.rename(place.with_name(f".{place.name}.old"))
                    shutil.rmtree(old)
        execute(experiment, SCRIPTS, runs)
    results = collect(experiment, [planned for runs in waves for planned in runs])
    write_report(results, shlex.join(sys.orig_argv))
    if results.base is not None and results.learners:
        print("\n".join(aligned(main_table(results))))
    progress(f"wrote {experiment.out_dir / 'report.md'}, results.jsonl and accuracy.png")


if __name__ == "__main__":
    run(main)
