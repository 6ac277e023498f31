"""Package metadata. Exact versions of everything that is installed are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (here / "unified_rl" / "__init__.py").read_text()).group(1)

setup(
    name="unified-rl",
    version=version,
    description="Self-rewarding reinforcement learning for unified multimodal models, on DeepSpeed ZeRO-3",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["unified_rl", "unified_rl.*"]),
    package_data={"unified_rl": ["recipes/*.yaml", "assets/**/*"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "transformers>=5.0",
        "deepspeed>=0.19.3",  # 0.19.3: frozen weights with activation checkpointing under ZeRO-3
        "diffusers>=0.41",
        "peft>=0.19",
        "safetensors",
        "tokenizers",
        "omegaconf>=2.3",
        "webdataset>=1.0",
        "numpy",
        "pillow",
        "matplotlib",
        "tensorboard",
        "tqdm",
        "ninja",  # DeepSpeed compiles its CPU communication when it is first used
        "setuptools>=77.0.3",  # torch needs it to compile, tensorboard to start
    ],
    extras_require={
        "flash": ["flash-attn>=2.7"],  # used when importable on a GPU; needs the CUDA toolkit to install
        "dev": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff"],
    },
)
