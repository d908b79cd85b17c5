"""Packaging of both packages. These are the ranges that should work; constraints.txt has the exact versions tested.

A machine that exports installs no JAX, one that trains no PyTorch. The base is what both share; an extra adds to it.
"""

from setuptools import find_packages, setup

BASE = [  # what a machine that exports and a machine that trains both need
    "absl-py",
    "etils[epath]",
    "fsspec",
    "google-crc32c",
    "jinja2",
    "matplotlib",
    "ml-collections",
    "ml-dtypes",
    "numpy>=2",
    "pillow",
    "safetensors",
    "tensorflow-datasets>=4.9.10,<5",  # the next major version may need TensorFlow to write records
    "tqdm",
    "typeguard",
]
TRANSFORMERS = ["transformers>=5,<6"]  # tokenizer files are written in the form of version 5
TRAIN = [
    "flax>=0.12.8,<0.13",  # NNX changes the meaning of variables between minor versions
    "grain>=0.2.18,<0.3",  # before 1.0 the form of an iterator's saved state may change
    "jax>=0.10,<0.11.1",  # flax 0.12.8 breaks on jax 0.11.1; Python 3.11 gets at most 0.10.2
    "optax>=0.2.8,<0.3",  # before 1.0 the form of optimizer states may change
    "orbax-checkpoint>=0.12.8,<0.13",  # before 1.0 checkpoint arguments may change
    "scipy",
    "tensorboard",
    "tensorboardX",
    "tensorstore",
    "tokenizers",
    *TRANSFORMERS,
]
PHOTOS = ["scikit-image", "scikit-learn"]  # the classical refiner's descriptor, and the quickstart's photos
COCO = ["pycocotools"]
TORCH = ["torch>=2.6,<2.14"]  # 2.6 made weights_only the default of torch.load; 2.13 is the newest tested
HF = ["accelerate", "peft", *TORCH]
GCS = ["gcp-storage-emulator", "gcsfs"]  # the slow tests of exports into an object store
EXTRAS = {
    "quickstart": [*TRAIN, *PHOTOS],
    "train": TRAIN,
    "tpu": [*TRAIN, "jax[tpu]"],
    "cuda": [*TRAIN, "jax[cuda13]"],
    # The newest libtpu cannot give the text of v5p programs; this is the version that jax[tpu] 0.10.2 pins.
    "plan": [*TRAIN, "libtpu==0.0.42.*"],
    "refiner": [*PHOTOS, *COCO, *TORCH, *TRANSFORMERS],
    "beam": ["apache-beam[gcp]>=2.77"],
    "hf": [*TRAIN, *HF],  # to try what was exported, and to import PyTorch checkpoints
    "eval": [*TRAIN, "pycocoevalcap>=1.2"],
    "dev": ["pytest", "pytest-xdist", "ruff", *GCS, *TRAIN, *PHOTOS, *COCO, *HF],
}

setup(
    name="lyrics_jax",
    version="0.1.0",
    description="Trains Lyrics and related vision-language models on TPU pods: export, alignment, instruction tuning",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",  # 3.14 is not tested: not every dependency has wheels for it
    packages=find_packages(include=["lyrics_jax", "lyrics_jax.*", "refiner_export", "refiner_export.*"]),
    package_data={"refiner_export": ["pages/*.jinja", "sources/*.json"],
                  "lyrics_jax": ["weights/*.jinja", "torch_model/*.py"]},
    install_requires=BASE,
    extras_require=EXTRAS,
)
