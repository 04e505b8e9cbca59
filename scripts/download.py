"""Fetch a checkpoint from a Hugging Face hub: safetensors, JSON and tokenizer files, nothing else."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_llama.checkpoint import model_tensors
from lit_llama.command_line import progress, run
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError, RunError
from lit_llama.files import atomic_directory, refuse_overwrite


def main(
    *,
    repo_id: str,
    checkpoint_dir: Path,
    revision: str | None = None,
    token_file: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Download a Llama or Mistral checkpoint; run again after a break, it fetches only the files that are missing.

    The hub's address is taken from the environment variable HF_ENDPOINT. Files wait in a hidden directory beside
    checkpoint_dir until all are there.

    Args:
        repo_id: Repository of the model, for example HuggingFaceTB/SmolLM2-135M.
        checkpoint_dir: The directory to write.
        revision: Branch, tag or commit; by default the main branch.
        token_file: A file holding an access token; by default HF_TOKEN or the token saved by `hf auth login`.
        overwrite: Replace what is in checkpoint_dir.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    except ImportError:
        raise InputError("downloading needs the package huggingface_hub: pip install huggingface_hub") from None
    refuse_overwrite(checkpoint_dir, overwrite)
    token = read_token(token_file) if token_file else None

    with one_line_errors(repo_id, revision):
        info = HfApi(token=token).model_info(repo_id, revision=revision)
    names = select_files([file.rfilename for file in info.siblings])
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise InputError(
            f"{repo_id} has no config.json with model.safetensors or shards of it; choose another repository"
        )

    with one_line_errors(repo_id, revision), tempfile.TemporaryDirectory() as directory:
        # An architecture that cannot be used is worth knowing before the gigabytes.
        hf_hub_download(repo_id, "config.json", revision=info.sha, local_dir=directory, token=token)
        config = LlamaConfig.from_json(directory)

    partial = checkpoint_dir.parent / f".{checkpoint_dir.name}.{repo_id.replace('/', '--')}.{info.sha[:12]}.partial"
    progress(f"downloading {len(names)} files of {repo_id} at {info.sha[:12]}")
    with one_line_errors(repo_id, revision):
        snapshot_download(repo_id, revision=info.sha, local_dir=partial, allow_patterns=names, token=token)
    model_tensors(partial, config.tie_word_embeddings)
    with atomic_directory(checkpoint_dir, overwrite) as directory:
        for name in names:
            (partial / name).rename(directory / name)
    shutil.rmtree(partial)
    print(checkpoint_dir)


def select_files(names: list[str]) -> list[str]:
    """The files of a repository that make a checkpoint directory: no pickles, no code, no weights twice."""
    weights = [name for name in names if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)]
    if "model.safetensors" in weights:
        weights = ["model.safetensors"]
    others = [
        name
        for name in names
        if "/" not in name
        and (name.endswith((".json", ".jinja")) or name == "tokenizer.model")
        and ".index." not in name
    ]
    return sorted(weights + others)


def read_token(path: Path) -> str:
    """The access token in a file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; it should hold the access token")
    return path.read_text().strip()


@contextmanager
def one_line_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Say in one line what the hub client says in many."""
    # HTTPError is the base of what the client's HTTP library raises; which library that is depends on the release.
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise InputError(
            f"{repo_id} is gated: accept its terms on the hub, then pass --token_file or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{repo_id}: no such repository on the hub; if it is private, pass --token_file or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{repo_id} has no revision {revision!r}") from None
    except HFValidationError:
        raise InputError(f"{repo_id!r} is not the name of a repository; expected OWNER/NAME") from None
    except HfHubHTTPError as error:
        raise RunError(f"{repo_id}: the hub answers {error.response.status_code}; run again later") from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HTTPError) as error:
        reason = str(error.__cause__ or error).split("\n")[0]
        raise InputError(f"{repo_id}: the hub cannot be reached ({reason}); check the network and run again") from None


if __name__ == "__main__":
    run(main)
