"""Why DVC failed is said in DVC's own words, wherever they stand in what it printed."""

from __future__ import annotations

import pytest

from flows.project.dvc_command import explain_failure, find_reason

TROUBLES = ["", "Having any troubles? Hit us up at https://dvc.org/support, we are always happy to help!"]
TORN = "Unable to read RWLock-file '.dvc/tmp/rwlock'. JSON structure is corrupted"
FALSE = "ERROR: failed to reproduce 'last': failed to run: python work.py last, exited with 1"
MISSING = [
    "ERROR: Checkout failed for following targets:",
    "models/slow",
    "Is your cache up to date?",
    "<https://error.dvc.org/missing-files>",
]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([f"ERROR: {TORN}", *TROUBLES], TORN),
        ([f"ERROR: failed to reproduce 'last': {TORN}", *TROUBLES], TORN),
        (["ERROR: unexpected error - [Errno 28] No space left on device", *TROUBLES], "[Errno 28] No space left on device"),
        (["Running stage 'last':", "> python work.py last", "last: it was told to fail", FALSE], "last: it was told to fail"),
        (["Running stage 'last':", "> python work.py last", FALSE], "failed to run: python work.py last, exited with 1"),
        (MISSING, "Checkout failed for following targets: models/slow Is your cache up to date? <https://error.dvc.org/missing-files>"),
        (["what is no error"], "what is no error"),
        ([], "without a word"),
    ],
)
def test_dvcs_reason_is_never_dropped(lines: list[str], reason: str) -> None:
    assert explain_failure(lines) == reason
    assert reason == "last: it was told to fail" or find_reason(lines).endswith(reason)
