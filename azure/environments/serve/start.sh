#!/bin/sh
# Serve the model folder that Azure ML mounted below AZUREML_MODEL_DIR (or that MODEL names), under the name that
# LLMKIT_REVISION gives: the deployment's, so that every reply says which deployment it comes from. The endpoint in front
# checks the keys; probes and requests come to port 8000 from other machines.
set -eu
model="${MODEL:-}"
if [ -z "$model" ]; then
  : "${AZUREML_MODEL_DIR:?error: no model: the deployment names none, and MODEL is not set}"
  # The asset's own folder, or one below it: the config.json that is nearest to the root.
  model=$(find -L "$AZUREML_MODEL_DIR" -maxdepth 4 -name config.json -printf '%d %h\n' | sort -n | sed -n '1s/^[0-9]* //p')
  [ -n "$model" ] || { echo "error: no config.json in $AZUREML_MODEL_DIR: the model is no model folder" >&2; exit 2; }
fi
set -- --host "${HOST:-0.0.0.0}" --port "${PORT:-8000}" --gateway --timeout "${LLMKIT_TIMEOUT:-170}" \
  --slots "${LLMKIT_SLOTS:-8}" --queue "${LLMKIT_QUEUE:-64}" --engine "${LLMKIT_ENGINE:-auto}" --log-json
set -- "${LLMKIT_REVISION:-revision}=$model" "$@"
echo "llmkit serve $*" >&2
exec llmkit serve "$@"
