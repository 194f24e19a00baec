#!/bin/sh
# `convoy train --retrain` for a Job, which knows one good end: 3 (what was trained is no better than
# what serves) and 4 (nothing new to learn from) are such, too.
convoy train --retrain "$@" &
training=$!
# A shell that is process 1 hands no signal on by itself.
trap 'kill -TERM "$training"' TERM INT
wait "$training"
status=$?
# It was the signal that ended this.
while kill -0 "$training" 2>/dev/null; do
    wait "$training"
    status=$?
done
case $status in
3 | 4) exit 0 ;;
esac
exit "$status"
