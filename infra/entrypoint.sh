#!/bin/sh
# A container brings the tools, and takes the project from git: what a run is, is a commit. The checkout, its DVC cache and its
# checkpoints are in the volume, so that a run that is started again goes on where it was.
set -eu

checkout=${CF_CHECKOUT:-$HOME/context-forcing}
if [ ! -e "$checkout/.git" ]; then
  : "${CF_REPOSITORY:?is not set: the git repository that a checkout is made from, without credentials in it}"
  case $CF_REPOSITORY in -*) echo "CF_REPOSITORY begins with a dash" >&2; exit 2 ;; esac
  case ${CF_BRANCH:-main} in -* | *[!A-Za-z0-9._/-]*) echo "CF_BRANCH is no name of a branch" >&2; exit 2 ;; esac
  # to a name of its own first: a clone that was cut off is not taken for a checkout
  rm -rf "$checkout.partial"
  git clone --quiet --branch "${CF_BRANCH:-main}" -- "$CF_REPOSITORY" "$checkout.partial"
  mv "$checkout.partial" "$checkout"
fi
cd "$checkout"
PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
exec "$@"
