"""Packaging of lyrics_jax and refiner_export. Exact tested versions are in constraints.txt; here are the ranges that should work."""

from setuptools import find_packages, setup

BASE = [
    "absl-py",
    "etils[epath]",
    "flax>=0.12.8,<0.13",  # NNX changes the meaning of variables between minor versions
    "google-crc32c",
    "grain>=0.2.18,<0.3",  # before 1.0 the form of an iterator's saved state may change
    "jax>=0.10,<0.11.1",  # flax 0.12.8 breaks on jax 0.11.1; Python 3.11 gets at most 0.10.2
    "jinja2",
    "matplotlib",
    "ml-collections",
    "ml-dtypes",
    "numpy>=2",
    "optax>=0.2.8,<0.3",  # before 1.0 the form of optimizer states may change
    "orbax-checkpoint>=0.12.8,<0.13",  # before 1.0 checkpoint arguments may change
    "pillow",
    "safetensors",
    "tensorboard",
    "tensorboardX",
    "tensorflow-datasets>=4.9.10,<5",  # the next major version may need TensorFlow to write records
    "tensorstore",
    "tokenizers",
    "tqdm",
    "transformers>=5,<6",  # tokenizer files are written in the form of version 5
    "typeguard",
]
PHOTOS = ["scikit-image", "scikit-learn"]  # the classical refiner's descriptor, and the quickstart's photos
COCO = ["pycocotools"]
TORCH = ["torch>=2.6,<2.14"]  # 2.6 made weights_only the default of torch.load; 2.13 is the newest tested

setup(
    name="lyrics_jax",
    version="0.1.0",
    description="Trains Lyrics vision-language models on TPU pods: refiner export, MQ-Former alignment, instruction tuning",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",  # 3.14 is not tested: not every dependency has wheels for it
    packages=find_packages(include=["lyrics_jax", "lyrics_jax.*", "refiner_export", "refiner_export.*"]),
    package_data={"refiner_export": ["pages/*.jinja", "sources/*.json"], "lyrics_jax": ["evaluation/*.jinja", "weights/*.jinja", "torch_model/*.py"]},
    install_requires=BASE,
    extras_require={
        "quickstart": PHOTOS,
        "refiner": [*PHOTOS, *COCO, *TORCH],
        "tpu": ["jax[tpu]"],
        "plan": ["libtpu==0.0.42.*"],  # what jax[tpu] 0.10.2 pins: with a newer one the text of v5p programs cannot be had
        "cuda": ["jax[cuda13]"],
        "beam": ["apache-beam[gcp]>=2.77"],
        "hf": ["accelerate", "peft", *TORCH],  # to try what was exported, and to import PyTorch checkpoints
        "eval": ["pycocoevalcap>=1.2"],
        "dev": ["pytest", "pytest-xdist", "accelerate", "peft", *PHOTOS, *COCO, *TORCH],
    },
)
