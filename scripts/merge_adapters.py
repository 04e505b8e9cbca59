"""Combine several LoRA adapters of one base into one: weighted sums, low-rank re-compression, TIES, DARE, pruning.

python scripts/merge_adapters.py --adapters '[out/rivers, out/history]' --weights '[0.7, 0.3]' --method svd --rank 16
--out_dir out/both

The result is an adapter like any other; to merge it into its base, give it to scripts/merge_lora.py.
"""

from lit_llama.adapter_composition import CompositionArguments, write_combined_adapter
from lit_llama.command_line import run


def main(arguments: CompositionArguments) -> None:
    report = write_combined_adapter(arguments)
    line = f"{arguments.out_dir}: rank {report['rank']} in {report['layers']} layers"
    if (by_layer := report.get("energy_kept_by_layer")) is not None:
        least = min(by_layer, key=by_layer.__getitem__)
        line += f"; kept {report['energy_kept']:.1%} of the squared norm, least {by_layer[least]:.1%} in {least}"
    print(line)


if __name__ == "__main__":
    run(main)
