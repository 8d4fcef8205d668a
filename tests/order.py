"""Which files of tests take longest, in seconds of processor time, roughly: the longest begin first, and `make test-quick` leaves all
of these out. A file that isn't here takes less than five."""

from __future__ import annotations

SECONDS = {
    "flows/test_pipeline_flow.py": 150,
}
