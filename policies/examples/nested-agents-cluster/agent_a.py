"""Agent A: a Python program that runs kubectl, or starts agent B to do so.

It has a kubeconfig without a credential (KUBECONFIG), and nothing about a gateway in its code.
"""

import os
import subprocess
import sys
from pathlib import Path


def main() -> int:
    match sys.argv[1:]:
        case ["start-b", job]:
            return subprocess.run(["/bin/sh", Path(__file__).parent / "agent_b.sh", job], check=False).returncode
        case ["kubectl", *arguments]:
            return subprocess.run([os.environ["KUBECTL"], *arguments], check=False).returncode
        case other:
            sys.exit(f"no such job: {other}")


if __name__ == "__main__":
    sys.exit(main())
