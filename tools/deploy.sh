#!/usr/bin/env bash
# Put a model on an endpoint: into the deployment without traffic, tried alone, then given its share.
#   tools/deploy.sh ENDPOINT MODEL ENVIRONMENT SHARE        for example llmkit llmkit:3 llmkit-serve:1f2e3d 5
# SHARE is the new deployment's percentage; the first deployment of an endpoint gets all. Wants `az` with its ml
# extension, logged in, and AZURE_SUBSCRIPTION_ID, AZURE_RESOURCE_GROUP, AZUREML_WORKSPACE_NAME.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 4 ] || { echo "usage: $0 ENDPOINT MODEL ENVIRONMENT SHARE" >&2; exit 2; }
endpoint=$1 model=$2 environment=$3 share=$4
: "${AZURE_SUBSCRIPTION_ID:?error: set it}" "${AZURE_RESOURCE_GROUP:?error: set it}" "${AZUREML_WORKSPACE_NAME:?error: set it}"
[[ $share =~ ^[0-9]+$ && $share -le 100 ]] || { echo "error: SHARE is $share, not 0 to 100" >&2; exit 2; }
wait_s=${LLMKIT_WAIT_S:-10} looks=${LLMKIT_LOOKS:-180}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

ml() { # ml WORDS...: az ml, in this workspace
  az ml "$@" --subscription "$AZURE_SUBSCRIPTION_ID" --resource-group "$AZURE_RESOURCE_GROUP" \
    --workspace-name "$AZUREML_WORKSPACE_NAME"
}

settled() { # the endpoint takes no call while it is "Updating"
  for _ in $(seq "$looks"); do
    case $(ml online-endpoint show --name "$endpoint" --query provisioning_state --output tsv) in
      Succeeded) return 0 ;;
      Failed | Canceled) echo "error: endpoint $endpoint is in a failed state; look at it in the studio" >&2; return 1 ;;
    esac
    sleep "$wait_s"
  done
  echo "error: endpoint $endpoint is still updating after $looks looks" >&2
  return 1
}

traffic() { # traffic NAME: its percentage, 0 if it has none
  local found
  found=$(ml online-endpoint show --name "$endpoint" --query "traffic.$1" --output tsv)
  echo "${found:-0}"
}

if ! ml online-endpoint show --name "$endpoint" --output none 2> "$tmp/why"; then
  grep -qiE "not ?found" "$tmp/why" || { cat "$tmp/why" >&2; exit 1; }
  envsubst < azure/deployment_configs/endpoint.yml > "$tmp/endpoint.yml"
  ml online-endpoint create --file "$tmp/endpoint.yml" --name "$endpoint" --output none
fi
settled

new=blue old=green
if [ "$(traffic blue)" -gt "$(traffic green)" ]; then new=green old=blue; fi
first=$([ "$(traffic "$old")" = 0 ] && echo yes || echo no)

if ! verb=$(ml online-deployment list --endpoint-name "$endpoint" --query "[?name=='$new'].name" --output tsv); then
  exit 1
fi
verb=$([ -n "$verb" ] && echo update || echo create)
echo "$endpoint: $verb $new with $model in $environment"
ml online-deployment "$verb" --file "azure/deployment_configs/$new.yml" --endpoint-name "$endpoint" --output none \
  --set "model=azureml:$model" "environment=azureml:$environment"
settled

# Alone, past the traffic's weights, before anybody else meets it.
uri=$(ml online-endpoint show --name "$endpoint" --query scoring_uri --output tsv)
key=$(ml online-endpoint get-credentials --name "$endpoint" --query primaryKey --output tsv)
printf 'header = "Authorization: Bearer %s"\n' "$key" > "$tmp/curl"
curl --fail-with-body --silent --show-error --max-time 170 --config "$tmp/curl" --header "azureml-model-deployment: $new" \
  --header "content-type: application/json" --data '{"model": "llmkit", "prompt": "def", "max_tokens": 4}' \
  "${uri%/}/v1/completions" | grep -q '"text"' || { echo "error: $new answers no completion; traffic stays" >&2; exit 1; }

[ "$first" = yes ] && share=100
weights="$new=$share"
[ "$first" = yes ] || weights="$weights $old=$((100 - share))"
ml online-endpoint update --name "$endpoint" --traffic "$weights" --output none
settled
now=$(traffic "$new")
[ "$now" = "$share" ] || { echo "error: $new has $now % of the traffic, not $share %" >&2; exit 1; }
echo "$endpoint: $weights"
