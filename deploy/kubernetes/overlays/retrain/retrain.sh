#!/bin/sh
# `convoy train --retrain` for a Job, which knows one good end: 3 (what was trained is no better than
# what serves) and 4 (nothing new to learn from) are such, too.

# A shell hands no signal on by itself. $! is the training, once there is one.
trap '[ "$!" ] || exit 143; kill -TERM "$!"' TERM INT
convoy train --retrain "$@" &
wait "$!"
status=$?
# It was the signal that ended this.
while kill -0 "$!" 2>/dev/null; do
    wait "$!"
    status=$?
done
case $status in
3 | 4) exit 0 ;;
esac
exit "$status"
