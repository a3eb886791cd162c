"""Packaging: `qlora` from ./qlora and `qlora.kernels` from ./kernels (also a symlink, qlora/kernels)."""

from pathlib import Path

from setuptools import setup

HF = ["transformers>=5.17", "safetensors>=0.5", "tokenizers>=0.22", "tqdm>=4.60"]
REPRO = [*HF, "accelerate>=1.0", "gguf>=0.17", "matplotlib>=3.8", "scipy>=1.11", "markdown>=3.5"]
TRAINERS = ["trl>=1.0", "datasets>=4.0"]
PEERS = ["bitsandbytes>=0.49", "peft>=0.18", "torchao>=0.18"]

setup(
    name="qlora-from-scratch",
    version="0.1.0",
    description="QLoRA from scratch: NF4, double quantization and LoRA in Triton and PyTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["qlora", "qlora.kernels"],
    package_dir={"qlora": "qlora", "qlora.kernels": "kernels"},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
    ],
    extras_require={
        "hf": HF,
        "repro": REPRO,
        "test": [*REPRO, *PEERS, *TRAINERS, "pytest>=8", "hypothesis>=6.100", "ruff>=0.12"],
        "bench": [*REPRO, *PEERS],
    },
    entry_points={"console_scripts": ["qlora = qlora.__main__:main"]},
)
