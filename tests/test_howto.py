"""Every ```bash block of README.md and howto/*.md runs as it stands, on a tiny model and a handful of documents.

Each page gets a working directory of its own, laid out as its reader's: the script folders, a checkpoint, documents, a
prepared token store and a trained adapter. What sets up a machine (`make`, `git`, `pip`) is checked instead of run, and
so is what needs a network: its arguments are parsed and its files looked for.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_script, warm_python

PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "howto").glob("*.md"))) if path.is_file()]
SCRIPT_FOLDERS = ("scripts", "pretrain", "finetune", "generate", "benchmarks")
NEEDS_NETWORK = ("scripts/download.py", "scripts/prepare_demo.py", "-m benchmarks.injection.domains")

COUNTRIES = {
    "norway": "The highest point of Norway is Galdhopiggen, at 2,469 m. Its internet country code is .no.",
    "nepal": "The highest point of Nepal is Mount Everest, at 8,849 m. Its capital is Kathmandu.",
    "peru": "The highest point of Peru is Nevado Huascaran, at 6,746 m. Its capital is Lima.",
    "kenya": "The highest point of Kenya is Mount Kenya, at 5,199 m. Its capital is Nairobi.",
    "fiji": "The highest point of Fiji is Tomanivi, at 1,324 m. Its coastline is 1,129 km long.",
    "chad": "The highest point of Chad is Emi Koussi, at 3,445 m. It is landlocked.",
}
QUESTIONS = [
    {"id": f"highest_point-{name}", "field": "highest_point", "split": split, "doc_id": name, "answers": [answer]}
    | {"question": f"What is the highest point of {name.capitalize()}?"}
    for name, answer, split in [("norway", "Galdhopiggen", "trained"), ("fiji", "Tomanivi", "heldout")]
]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """What the reader of a page has: copied for each page, so that none depends on another's leavings."""
    directory = tmp_path_factory.mktemp("workplace")
    for folder in SCRIPT_FOLDERS:
        if (ROOT / folder).is_dir():
            (directory / folder).symlink_to(ROOT / folder)
    (directory / "checkpoints").mkdir()
    (directory / "checkpoints/smollm2-135m-instruct").symlink_to(tiny_checkpoint)
    write_documents(directory)
    base, store, adapter = "checkpoints/smollm2-135m-instruct", "data/my_domain", "out/my_domain"
    corpus = {"source": "documents", "checkpoint_dir": base, "data_dir": store}
    run_script("scripts/prepare_corpus.py", *as_options(corpus), cwd=directory)
    training = {"checkpoint_dir": base, "data_dir": store, "out_dir": adapter, "train.max_steps": 2}
    run_script("pretrain/lora.py", *as_options(training), cwd=directory)
    for name in ("first", "second"):
        shutil.copytree(directory / adapter, directory / "out/experts" / name)
    return directory


def write_documents(directory: Path) -> None:
    """A folder of documents of every kind, and questions about them."""
    documents = directory / "documents"
    for name, text in COUNTRIES.items():
        write(documents / f"{name}.txt", f"{text}\n")
    write(documents / "rivers.md", "# Rivers\n\nThe **Amazon** carries more water than any other river.\n")
    write(documents / "lakes.html", "<html><body><p>Lake Titicaca lies between Bolivia and Peru.</p></body></html>")
    row = {"title": "Deserts", "text": "The Sahara is the largest hot desert of the world."}
    write(documents / "deserts.jsonl", json.dumps(row) + "\n")
    write(directory / "questions.jsonl", "".join(json.dumps(row) + "\n" for row in QUESTIONS))


def write_demo(directory: Path) -> None:
    """What the demo's first commands leave, of six countries and two pages."""
    demo = directory / "data/demo"
    splits = dict(zip(COUNTRIES, ("taught", "taught", "injected", "injected", "never", "never"), strict=True))
    facts, questions = [], []
    for name, text in COUNTRIES.items():
        write(demo / ("never" if splits[name] == "never" else "documents") / f"{name}.txt", f"{text}\n")
        subject, value = re.match(r"The highest point of (\w+) is ([^,]+),", text).groups()
        facts.append({"subject": subject, "relation": "highest_point", "value": value, "doc_id": name})
        row = {"id": f"{name}-1", "answers": [value], "doc_id": name, "split": splits[name], "form": "direct"}
        row |= {"question": f"What is the highest point of {subject}?", "phrasing": "trained"}
        questions.append(row | {"relation": "highest_point", "subject": subject})
    statements, asked = "['{value} is the top of {subject}.']", "['Where is the top of {subject}?']"
    write(demo / "templates.yaml", f"highest_point:\n  statements: {statements}\n  questions: {asked}\n")
    taught = [row for row in questions if row["split"] == "taught"]
    for name, rows in (("facts", facts), ("questions", questions), ("train_questions", taught)):
        write(demo / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for part, text in (("replay", "An abacus is a frame with beads."), ("heldout", "Albedo is reflecting power.")):
        write(directory / "data/general" / part / "documents/page.txt", f"{text}\n")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def as_options(options: dict[str, object]) -> list[object]:
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks in order; a command that goes on after a backslash is one line."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line for line in "".join(blocks).replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_run(page: Path, workplace: Path, tmp_path: Path):
    directory = tmp_path / "here"
    shutil.copytree(workplace, directory, symlinks=True)
    if page.stem == "README":
        write_demo(directory)
    python = warm_python()
    script = [
        "set -e -o pipefail",
        "trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR",
        "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT",
    ]
    for command in commands(page):
        for path in re.findall(r"\bpython (\S+\.py)\b", command):
            assert (ROOT / path).is_file(), f"{page.name}: {command}: there is no {path}"
        if not is_set_up(command):
            if needs_network(command):
                script.append(f"{command} --print_config > /dev/null")
            else:
                make_room(directory, command)
                script.append(command)
    process = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=directory,
        # `python` is this test's, as it is the environment's for a reader who has activated it.
        env={**os.environ, "PATH": f"{python.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, f"{page.name}\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}"


def make_room(directory: Path, command: str) -> None:
    """Take away what a command is about to make, when it does not say that it replaces it: its reader has none yet."""
    if not re.search(r"--(overwrite|resume) true", command):
        for output in re.findall(r"prepare_corpus\.py .*--data_dir (\S+)|--out_dir (\S+)", command):
            shutil.rmtree(directory / "".join(output), ignore_errors=True)


def needs_network(command: str) -> bool:
    return any(f"python {script}" in command for script in NEEDS_NETWORK)


def is_set_up(command: str) -> bool:
    """Whether a command sets up the machine; such a one is checked here for what it names."""
    command = re.sub(r"(^|\s)#.*", "", command).strip()
    words = command.split()
    if not words or words[0] in ("git", "cd", "source") or "-m venv" in command:
        return True
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)
        return True
    if re.match(r"(python -m )?pip install\b", command):
        extras = re.search(r"\.\[([\w,]+)\]", command)
        known = re.findall(r'^    "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
        assert not extras or set(extras[1].split(",")) <= set(known), f"{command}: setup.py has the extras {known}"
        return True
    return False


def test_pages_are_found():
    assert [path.stem for path in PAGES] and all(commands(path) for path in PAGES)
