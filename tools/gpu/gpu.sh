#!/usr/bin/env bash
# One call on a GPU machine; docs/gpu.md explains it. Environment: PYTHON, the interpreter that has torch and triton;
# BUDGET, seconds of this call; DATA, LOSSLESS and NETWORK, what the campaign trains on; OUT, a folder for what must
# survive the machine; REHEARSE=1, every part for seconds and without a GPU. Arguments go to tools/gpu/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
site=$PWD/runs/gpu${REHEARSE:+-rehearsal}/site
export PYTHONPATH=$site:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}
"$python" -m tools.gpu.provision install build/gpu/wheels "$site"
exec "$python" -m tools.gpu.gpu --budget $((${BUDGET:-540} - SECONDS)) ${REHEARSE:+--rehearse} ${DATA:+--data "$DATA"} \
  ${LOSSLESS:+--lossless "$LOSSLESS"} ${NETWORK:+--network "$NETWORK"} ${OUT:+--out "$OUT"} "$@"
