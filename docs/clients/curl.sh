#!/bin/sh
# curl: ./curl.sh localhost:8000 digits 3.png
set -eu
server=$1 model=$2 image=$3

# An image as the body, labels as JSON.
curl --silent --show-error --fail-with-body --data-binary "@$image" \
    "http://$server/v1/classify?model=$model&top_k=2"
echo

# Several, as a form has them.
curl --silent --show-error --fail-with-body --form "image=@$image" --form "image=@$image" \
    "http://$server/v1/classify?model=$model"
echo

# By the Open Inference Protocol: what the model takes, ...
curl --silent --show-error --fail-with-body "http://$server/v2/models/$model"
echo

# ... and inference. JSON has no bytes: the image goes as base64.
curl --silent --show-error --fail-with-body --data-binary @- "http://$server/v2/models/$model/infer" <<END
{"inputs": [{"name": "pixels", "datatype": "BYTES", "shape": [1],
             "parameters": {"content_type": "base64"}, "data": ["$(base64 "$image" | tr -d '\n')"]}],
 "outputs": [{"name": "probabilities", "parameters": {"classification": 1}}]}
END
echo
