#!/usr/bin/env bash
# Fill a folder with the wheels that benchmarks/gpu.sh needs besides torch and
# torchvision, in the versions of requirements.lock, for a machine without a network:
#
#     benchmarks/carry.sh [PYTHON-VERSION] [FOLDER]
#
# The folder is .wheels by default, which git ignores. These packages are what the
# ServerApp and the ClientApps import, not all that Flower asks for: no web server, no
# database and no Ray.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-3.12}
folder=${2:-.wheels}

flower=(flwr iterators cryptography cffi pycryptodome grpcio grpcio-health-checking
    protobuf click rich markdown-it-py mdurl pygments typer shellingham httpx httpcore
    h11 anyio certifi idna)
settings=(pydantic pydantic-core annotated-types typing-inspection typing-extensions
    platformdirs filelock safetensors pillow tqdm)
teacher=(open-clip-torch ftfy wcwidth timm regex huggingface-hub httpx2 httpcore2
    truststore hf-xet fsspec pyyaml packaging)

list=$(mktemp)
trap 'rm -f "$list"' EXIT
for name in "${flower[@]}" "${settings[@]}" "${teacher[@]}"; do
    grep -m 1 -oE "^$name==[^ ;]+" requirements.lock >>"$list" || {
        echo "requirements.lock has no $name" >&2
        exit 1
    }
done
platforms=()
for glibc in 34 31 28 27 24 17 12 5; do
    platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
rm -rf "$folder"
"${PYTHON:-.venv/bin/python}" -m pip download --quiet --no-deps --only-binary=:all: \
    --disable-pip-version-check --implementation cp --python-version "$version" \
    "${platforms[@]}" --dest "$folder" --requirement "$list"
du -sh "$folder"
