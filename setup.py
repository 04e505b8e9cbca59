"""Packaging: `pip install -e .` makes `lit_llama` importable; extras hold what only some users need."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
REQUIREMENTS = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]

EXTRAS = {
    "documents": ["pypdf>=6.0", "pyarrow>=20.0", "selectolax>=0.3"],
    "harness": ["lm_eval>=0.4.13"],
    "hub": ["huggingface_hub>=1.0"],
    "plots": ["matplotlib>=3.10"],
    "serve": ["fastapi>=0.135", "prometheus_client>=0.22", "uvicorn>=0.35"],
    "streaming": ["litdata>=0.2.76"],
    "tensorboard": ["tensorboard>=2.20"],
    "test": [
        "fastapi>=0.135",
        "gguf>=0.17",
        "lm_eval>=0.4.13",
        "openai>=2.0",
        "peft>=0.18",
        "prometheus_client>=0.22",
        "pytest>=8.4",
        "pytest-xdist>=3.8",
        "rouge-score>=0.1.2",
        "ruff>=0.14",
        "schemathesis>=4.0",
        "scipy>=1.14",
        "transformers>=5.0",
        "uvicorn>=0.35",
        "xllamacpp>=2026.10",  # llama.cpp as a prebuilt wheel: what GGUF files are checked against
    ],
}

setup(
    name="lit-llama",
    version="0.1.0",
    description="Turn a small Llama into a sub-domain expert on one consumer GPU, and know whether it worked",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["lit_llama", "lit_llama.*"]),
    package_data={"lit_llama": ["*.cpp", "*.hpp", "*.html"], "lit_llama.injection": ["*.css"]},
    install_requires=[line for line in REQUIREMENTS if line],
    extras_require=EXTRAS,
)
