#!/bin/sh
# Puts models, and policies of models (NAME.toml for NAME/versions.toml), on a volume where it has
# none of the name. Whole or not at all, whoever else does the same: what was there first stays.
#   seed.sh MODELS POLICIES VOLUME
set -eu

models=$1 policies=$2 volume=$3
beside=.seed-$HOSTNAME
for model in "$models"/*/; do
    name=$(basename "$model")
    [ -e "$volume/$name" ] && continue
    rm -rf "$volume/$beside"
    cp -r "$model" "$volume/$beside"
    mv -nT "$volume/$beside" "$volume/$name"
    rm -rf "$volume/$beside"
done
for policy in "$policies"/*.toml; do
    name=$(basename "$policy" .toml)
    # Where there are no policies, the pattern itself.
    [ -e "$policy" ] && [ -d "$volume/$name" ] || continue
    cp "$policy" "$volume/$name/$beside"
    # As `mv -n`, but in one step: a file that is there makes it fail. SMB has no such links.
    ln "$volume/$name/$beside" "$volume/$name/versions.toml" 2>/dev/null ||
        mv -n "$volume/$name/$beside" "$volume/$name/versions.toml" || true
    rm -f "$volume/$name/$beside"
done
