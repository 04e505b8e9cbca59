"""The two files of an adapter directory, whatever kind of adapter it holds (PEFT's layout).

adapter_config.json says what the adapter is, adapter_model.safetensors holds its tensors and, in its metadata, the
fingerprint of the base they were trained on. What the tensors mean is the business of `lora.py` and its like.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

from lit_llama.errors import InputError
from lit_llama.files import atomic_path, write_json

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the base."""


def write_adapter(
    adapter_dir: Path | str, description: dict[str, Any], state: Mapping[str, Tensor], fingerprint: str | None
) -> None:
    """Write both files; each is replaced as a whole.

    Args:
        description: what goes into adapter_config.json.
        state: the tensors, on any device.
        fingerprint: of the base (`Llama.fingerprint`), so that the adapter is not put on another one by mistake.
    """
    adapter_dir = Path(adapter_dir)
    adapter_dir.mkdir(parents=True, exist_ok=True)
    write_tensors(adapter_dir / "adapter_model.safetensors", state, fingerprint)
    write_json(adapter_dir / "adapter_config.json", description)


def write_tensors(path: Path, state: Mapping[str, Tensor], fingerprint: str | None) -> None:
    """Write tensors, on any device, as a safetensors file that remembers the fingerprint of the base."""
    # One key at most: safetensors writes several in random order, and equal adapters shall be equal files.
    metadata = {"base_fingerprint": fingerprint} if fingerprint else None
    # Copies, because safetensors takes no two tensors that share memory, as a tied embedding and head do.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file that `write_tensors` wrote, and the fingerprint of their base if it has one.

    Raises:
        InputError: an unreadable file; `remedy` says what to do.
    """
    try:
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            return state, (file.metadata() or {}).get("base_fingerprint")
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}){remedy}") from None


def read_adapter_state(adapter_dir: Path | str, fingerprint: str | None) -> dict[str, Tensor]:
    """The tensors of an adapter directory.

    Args:
        fingerprint: of the base that is loaded; None: not known.

    Raises:
        InputError: no such file, an unreadable one, or an adapter that was trained on another base.
    """
    path = Path(adapter_dir) / "adapter_model.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    state, trained_on = read_tensors(path, "; was the copy cut short?")
    if trained_on and fingerprint and trained_on != fingerprint:
        raise InputError(
            f"{adapter_dir} was trained on another base (fingerprint {trained_on[:12]}) than the one loaded"
            f" ({fingerprint[:12]}); load the base it was trained on"
        )
    return state


def fill_parameters(
    parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], adapter_dir: Path | str
) -> None:
    """Copy the tensors of an adapter directory into the parameters of the same names.

    Raises:
        InputError: a name that is only in one of them, or another shape.
    """
    path = Path(adapter_dir) / "adapter_model.safetensors"
    differing = sorted(parameters.keys() ^ state.keys())
    if differing:
        raise InputError(f"{path} does not fit the model: {differing[0]} is only in one of them")
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise InputError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, this base needs {tuple(parameter.shape)}:"
                " the adapter was made for another base"
            )
        parameter.detach().copy_(state[name])
