"""The pipeline under Prefect. Nothing here knows what a stage does: no torch, no cf_model; of tasks what reads and writes files."""

import os

# Read by Prefect when it is imported, so stated before; the environment still has the last word.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
# The server that a flow without one starts takes 20 s on a busy machine, and 20 s is also where Prefect gives up.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
