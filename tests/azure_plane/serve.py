"""The plane as a process: `python tests/azure_plane/serve.py --home DIR` prints one line when it is ready.

The line is `ready FILE`: set LLMKIT_AZURE_CLOUD to that file. SIGTERM or the end of standard input ends it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from azure_plane import Plane  # noqa: E402


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="folder for everything that it keeps")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds that a long operation takes")
    parser.add_argument("--blobs", default="auto", choices=["auto", "azurite", "stub"])
    parser.add_argument("--no-mlflow", action="store_true", help="give jobs no MLflow run")
    parser.add_argument("--stay", action="store_true", help="do not end with standard input")
    args = parser.parse_args()
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    with Plane(args.home, delay=args.delay, blobs=args.blobs, mlflow=not args.no_mlflow) as plane:
        print(f"ready {plane.cloud}", flush=True)
        if not args.stay:
            threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
        done.wait()


if __name__ == "__main__":
    main()
