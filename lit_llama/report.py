"""report.json and report.md of a training run: what the model learned, what it forgot, what it cost."""

import math
from pathlib import Path
from typing import Any

import torch

from lit_llama.files import atomic_file, write_json
from lit_llama.hardware import peak_memory_gb, run_environment
from lit_llama.tracking import read_probes


def write_report(out_dir: Path, facts: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Complete the facts of a run with its probes, hardware and versions, and write both files.

    Args:
        facts: counts, times, "before" and "after" metrics; see `run_files.RunFiles.report`.

    Returns:
        What report.json holds.
    """
    before, after = (_with_perplexity(facts[when]) for when in ("before", "after"))
    probes = _probes_before_and_after(out_dir / "probes.jsonl")
    report = {
        **facts,
        "before": before,
        "after": after,
        "peak_memory_gb": peak_memory_gb(device),
        "probes": probes,
        **run_environment(),
    }
    write_json(out_dir / "report.json", report)
    with atomic_file(out_dir / "report.md") as file:
        file.write(_markdown(out_dir.name, report))
    return report


def _with_perplexity(metrics: dict[str, float]) -> dict[str, float]:
    losses = {name: value for name, value in metrics.items() if name.endswith("_loss")}
    return metrics | {f"{name.removesuffix('_loss')}_perplexity": math.exp(loss) for name, loss in losses.items()}


def _probes_before_and_after(path: Path) -> list[dict[str, Any]]:
    """Per question the first and the last answer on record."""
    if not path.is_file():
        return []
    questions: dict[str, dict[str, Any]] = {}
    for row in read_probes(path):
        entry = questions.setdefault(row["question"], {"question": row["question"], "before": row["answer"]})
        entry["after"] = row["answer"]
        if "answers" in row:
            entry["answers"] = row["answers"]
            entry.setdefault("correct_before", row["correct"])
            entry["correct_after"] = row["correct"]
    return list(questions.values())


_ROWS = (
    ("val_loss", "held-out loss", "{:.3f}"),
    ("val_perplexity", "held-out perplexity", "{:.2f}"),
    ("val_bits_per_byte", "held-out bits per byte", "{:.3f}"),
    ("general_perplexity", "general text perplexity", "{:.2f}"),
    ("probe_accuracy", "probe questions answered", "{:.0%}"),
    ("val_accuracy", "held-out accuracy", "{:.1%}"),
    ("val_f1", "held-out F1, mean over labels", "{:.3f}"),
    ("val_matthews", "held-out Matthews correlation", "{:.3f}"),
)


def _markdown(name: str, report: dict[str, Any]) -> str:
    lines = [f"# {name}", "", f"Status: {report['status']}.", "", "| | before | after |", "|---|---|---|"]
    for key, title, form in _ROWS:
        if key in report["before"] and key in report["after"]:
            lines.append(f"| {title} | {form.format(report['before'][key])} | {form.format(report['after'][key])} |")
    speed = f", {report['tokens_per_second']:,.0f} tokens/s" if report["tokens_per_second"] else ""
    lines += [
        "",
        f"Trained {report['trainable_parameters']:,} of {report['total_parameters']:,} parameters"
        f" ({report['trainable_parameters'] / report['total_parameters']:.2%}) for {report['steps']} steps"
        f" ({report['epochs']:.2f} epochs), {report['tokens']:,} tokens, {report['seconds']:,.0f} s{speed},"
        f" peak memory {report['peak_memory_gb']:.2f} GB.",
    ]
    if report["best_step"] is not None:
        lines.append(f"Lowest held-out loss {report['best_val_loss']:.4f} after step {report['best_step']}: `best/`.")
    lines.append("")
    if report["probes"]:
        lines += ["## Probe questions", "", "| question | expected | before | after |", "|---|---|---|---|"]
        for probe in report["probes"]:
            expected = " / ".join(probe.get("answers", [])[:2])
            cells = (
                probe["question"],
                expected,
                _marked(probe["before"], probe.get("correct_before")),
                _marked(probe["after"], probe.get("correct_after")),
            )
            lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
        lines.append("")
    hardware, versions, source = report["hardware"], report["versions"], report["source"]
    lines += [
        "## Reproduce",
        "",
        f"```\n{source['command']}\n```",
        "",
        f"{', '.join(hardware['gpu']) or hardware['cpu']}, {hardware['cpu_count']} CPU cores; "
        + ", ".join(f"{package} {version}" for package, version in versions.items())
        + (f"; git {source['git_revision'][:12]}" if source["git_revision"] else "")
        + ".",
        "",
    ]
    return "\n".join(lines)


def _marked(answer: str, correct: bool | None) -> str:
    return answer if correct is None else f"{'✓' if correct else '✗'} {answer}"


def _cell(text: str, limit: int = 120) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= limit else text[: limit - 1] + "…"
