#!/bin/sh
# The retrain job of one model, with the settings and data of the version that serves. It ends with 0
# where a better version was published, 3 where it was no better, 4 where there is nothing new to learn
# from; a second one at the same time gives way.
set -eu

model=${1:-}
# It comes from outside, and is to be a name.
case $model in
'' | [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*)
    echo "no name of a model: '$model'" >&2
    exit 2
    ;;
esac

# In Kubernetes, where a CronJob holds the job's settings, instead:
#   exec kubectl create job --from="cronjob/retrain-$model" "retrain-$model-$(date +%s)"
exec convoy train --retrain --base "models/$model" --summary "retrain-$model.json"
