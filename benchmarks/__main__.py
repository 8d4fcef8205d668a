"""One entry for every benchmark: `python -m benchmarks NAME [ARGUMENTS]`; without a name, what there is; `all`: docs/speed.md."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

from benchmarks.common.machine import ENVIRONMENT

HERE = Path(__file__).parent
OF_THE_PAGE = ("chunk", "generation", "audit", "training", "data", "evaluation", "overhead", "page")  # what `all` runs, each in its process


def list_benchmarks() -> dict[str, str]:
    """Name -> first line of its docstring."""
    files = [file for file in sorted(HERE.glob("*.py")) if not file.name.startswith("__")]
    return {file.stem: (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0] for file in files}


def main() -> None:
    benchmarks = list_benchmarks()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "all":
        environment = os.environ | ENVIRONMENT
        failed = [one for one in OF_THE_PAGE if subprocess.run([sys.executable, "-m", "benchmarks", one], env=environment).returncode]
        sys.exit(f"failed: {', '.join(failed)}" if failed else 0)
    if name in benchmarks:
        sys.argv = [str(HERE / f"{name}.py"), *sys.argv[2:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
    elif name in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [ARGUMENTS]\n")
        print("\n".join(f"  {name:<18} {about}" for name, about in benchmarks.items()))
    else:
        sys.exit(f"{name} is no benchmark; known are {', '.join(benchmarks)}")


if __name__ == "__main__":
    main()
