#!/bin/sh
# Installs what `compare_cpu.py` compares with into a folder outside of this repository; compiling takes some minutes.
#   sh ops/bench/compare/install_peers.sh ~/pathfox-peers
# Then: .venv/bin/python ops/bench/compare_cpu.py --peers ~/pathfox-peers
set -eu
peers=${1:?give a folder}
python=${PYTHON:-python3.11}
mkdir -p "$peers"
cd "$peers"

"$python" -m venv venv
venv/bin/pip install -q --disable-pip-version-check openvino-genai==2026.4.1 cmake

# llama-cpp-python's source package carries llama.cpp. Its high-level API generates one sequence at a time, so we build
# the carried library's own tools: they batch, and they measure without a binding in between.
venv/bin/pip download -q --disable-pip-version-check --no-deps --no-binary :all: llama-cpp-python==0.3.36
tar -xzf llama_cpp_python-0.3.36.tar.gz
nice venv/bin/cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B lb -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
nice venv/bin/cmake --build lb -j "$(nproc)" --target llama-batched-bench llama-quantize
