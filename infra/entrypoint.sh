#!/bin/sh
# A container brings the tools, and takes the project from git: what a run is, is a commit. The checkout, its DVC cache and its
# checkpoints are in the volume, so that a run that is started again goes on where it was.
set -eu

# what reaches no container by its environment (Prefect's docker worker passes nothing on) may stand in the volume, as NAME='value' lines
if [ -f "$HOME/cf.env" ]; then set -a; . "$HOME/cf.env"; set +a; fi
export GIT_TERMINAL_PROMPT=0
checkout=${CF_CHECKOUT:-$HOME/context-forcing}
if [ ! -e "$checkout/.git" ]; then
  : "${CF_REPOSITORY:?is not set: the git repository that a checkout is made from, without credentials in it}"
  case $CF_REPOSITORY in -*) echo "CF_REPOSITORY begins with a dash" >&2; exit 2 ;; esac
  if printf '%s\n' "$CF_REPOSITORY" | grep -Eq '^https?://[^/]*@|^[^:/]+://[^/@]*:[^/@]*@'; then # git would keep them in .git/config
    echo "CF_REPOSITORY holds credentials; put them into ~/.netrc or ~/.ssh of the volume, and state it without" >&2; exit 2
  fi
  case ${CF_BRANCH:-main} in -* | *[!A-Za-z0-9._/-]*) echo "CF_BRANCH is no name of a branch" >&2; exit 2 ;; esac
  # to a name of its own first: a clone that was cut off is not taken for a checkout
  rm -rf "$checkout.partial"
  git clone --quiet --branch "${CF_BRANCH:-main}" -- "$CF_REPOSITORY" "$checkout.partial"
  mv "$checkout.partial" "$checkout"
  cd "$checkout"
else
  # not by force: what somebody has changed or committed here stays, and nights take the newest commit themselves
  cd "$checkout"
  if [ -n "$(git status --porcelain --untracked-files=no)" ]; then
    echo "$checkout has changes, so it stays at $(git rev-parse --short HEAD)" >&2
  elif ! { timeout 120 git fetch --quiet && git merge --quiet --ff-only '@{upstream}'; }; then
    echo "$checkout could not be brought up to date, so it stays at $(git rev-parse --short HEAD)" >&2
  fi
fi
PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
exec "$@"
