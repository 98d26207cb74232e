#!/usr/bin/env bash
# Collects what benchmarks/gpu.py needs on a GPU host without a network that has torch, torchvision, timm,
# NumPy, Pillow, SciPy, scikit-learn, matplotlib, safetensors, xxhash, torchmetrics and jinja2:
#
#     benchmarks/wheels.sh [FOLDER]           default: build/wheels, which git ignores
#
# There, in a copy of this repository with that folder:
#
#     python -m pip install --no-index --no-deps --find-links build/wheels -r build/wheels/requirements.txt
#     cp build/wheels/_native.so src/reconverge/data/
#     python benchmarks/gpu.py --minutes 8 --out results
#
# PYTHON_VERSION: of that host, if it is not 3.12. The native decoder is a C library without Python's API, so
# any Python here builds it for every other, if there are a C compiler and the headers of libjpeg-turbo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-build/wheels}
python=${PYTHON:-python3}
most=$((64 * 1024 * 1024))
packages=(hydra-core omegaconf PyYAML webdataset braceexpand tensorboardX protobuf packaging
    rich markdown-it-py mdurl Pygments simplejpeg lightning-utilities)
pip=("$python" -m pip --quiet --disable-pip-version-check)

mkdir -p "$folder"
rm -f "$folder"/*.whl "$folder"/_native.so
"${pip[@]}" download --no-deps --only-binary=:all: --dest "$folder" -c constraints.txt \
    --python-version "${PYTHON_VERSION:-3.12}" --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "${packages[@]}"
# It is published as source only, and any Python can build it.
"${pip[@]}" wheel --no-deps --wheel-dir "$folder" antlr4-python3-runtime==4.9.3
printf '%s\n' "${packages[@]}" antlr4-python3-runtime > "$folder/requirements.txt"

"${pip[@]}" wheel --no-deps --wheel-dir "$folder/built" .
"$python" -m zipfile -e "$folder"/built/*.whl "$folder/built"
cp "$folder"/built/reconverge/data/_native.*.so "$folder/_native.so" \
    || echo "the native decoder was not built: is there a C compiler, and libjpeg-turbo's headers?" >&2
rm -r "$folder/built"

bytes=$(du -sb "$folder" | cut -f1)
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $((bytes / 1024)) KiB in $folder"
if [ "$bytes" -gt "$most" ]; then
    echo "more than $((most / 1024)) KiB" >&2
    exit 1
fi
