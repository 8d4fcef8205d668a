"""Shapes are checked while the tests run: jaxtyping's annotations, enforced by beartype, before anything of ours is imported."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["CF_KEPT"] = "off"  # tests/test_kept.py asks for it
os.environ["WANDB_MODE"] = "disabled"  # whatever the shell says; the tests of the mirror ask for offline themselves

import hypothesis
from jaxtyping import install_import_hook

install_import_hook("cf_model", "shapes.check")
hypothesis.settings.register_profile("ours", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ours")
