#!/bin/sh
# Serve the model folder that Azure ML mounted below AZUREML_MODEL_DIR (or that MODEL names), under the deployment's
# name. The endpoint in front checks the keys; probes and requests come to port 8000 from other machines.
set -eu
model="${MODEL:-}"
if [ -z "$model" ]; then
  : "${AZUREML_MODEL_DIR:?error: no model: the deployment names none, and MODEL is not set}"
  # The asset's own folder, or one below it: the config.json that is nearest to the root.
  model=$(find -L "$AZUREML_MODEL_DIR" -maxdepth 4 -name config.json -printf '%d %h\n' | sort -n | sed -n '1s/^[0-9]* //p')
  [ -n "$model" ] || { echo "error: no config.json in $AZUREML_MODEL_DIR: the model is no model folder" >&2; exit 2; }
fi
set -- --host "${HOST:-0.0.0.0}" --port "${PORT:-8000}" --gateway --timeout "${LLMKIT_TIMEOUT:-170}" \
  --slots "${LLMKIT_SLOTS:-8}" --queue "${LLMKIT_QUEUE:-64}" --log-json
revision="${LLMKIT_REVISION:-revision}"  # what replies call their system_fingerprint
echo "llmkit serve $revision=$model $*" >&2
exec llmkit serve "$revision=$model" "$@"
