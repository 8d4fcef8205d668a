"""An empty database of Prefect's server, made once: its hundred migrations take as long as all else that a server does to start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.once import made_once

MIGRATE = "import asyncio; from prefect.server.database import provide_database_interface as find; asyncio.run(find().create_db())"


def copy_database(folder: Path, name: str = "prefect.db") -> Path:
    """Lay it into a folder, under the name that a server looks for; what SQLite has beside it goes along."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in made_once("prefect-database", _make).glob("prefect.db*"):
        shutil.copyfile(file, folder / file.name.replace("prefect.db", name))
    return folder


def _make(folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    folder.mkdir()
    subprocess.run([sys.executable, "-c", MIGRATE], env=environment | {"PREFECT_HOME": str(folder)}, check=True)
