#!/bin/sh
# `convoy train --retrain` for a Job, which knows one good end: 3 (what was trained is no better than
# what serves) and 4 (nothing new to learn from) are such, too. With STORE, the URL of an object store,
# what serves comes from there and the new version goes there, by way of the folder that --base is in.

# A shell hands no signal on by itself. $! is the training, once there is one.
trap '[ "$!" ] || exit 143; kill -TERM "$!"' TERM INT
if [ "${STORE:-}" ]; then
    for each in "$@"; do
        case $each in --base=*) base=${each#--base=} ;; esac
    done
    # A store that is away is for the Job to try again, unlike 1, which the training ends with.
    convoy models pull "$STORE" "$(dirname "$base")" || exit 75
fi
convoy train --retrain "$@" &
wait "$!"
status=$?
# It was the signal that ended this.
while kill -0 "$!" 2>/dev/null; do
    wait "$!"
    status=$?
done
case $status in
0 | 3 | 4) ;;
*) exit "$status" ;;
esac
# After 3 and 4, too: what an earlier run trained may not have got there. What has is not put there again.
[ -z "${STORE:-}" ] || convoy models push "$base" "$STORE" || exit 75
