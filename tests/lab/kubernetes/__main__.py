"""Fetches and builds what the Kubernetes laboratory is made of, where it is absent: minutes, once on a machine.

With `--check` nothing is made; the exit status says whether anything is to be done (1), or cannot be (3: no Go).
"""

import sys

from tests.lab.kubernetes.binaries import GoMissing, are_built, binaries
from tests.lab.kubernetes.clients import debian_kubectl, unpack_debian_kubectl

try:
    if sys.argv[1:] == ["--check"]:
        debian = debian_kubectl()
        sys.exit(0 if are_built() and (debian is None or debian[1].exists()) else 1)
    unpack_debian_kubectl()
    print(binaries().directory)
except GoMissing as error:
    print(f"kubernetes: {error}", file=sys.stderr)
    sys.exit(3)
