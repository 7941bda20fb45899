"""Fetches and builds what the Kubernetes laboratory is made of, where it is absent."""

import sys

from tests.lab.kubernetes.binaries import GoMissing, binaries
from tests.lab.kubernetes.clients import unpack_debian_kubectl

try:
    print(binaries().directory)
except GoMissing as error:
    sys.exit(f"kubernetes: {error}")
print(unpack_debian_kubectl() or "kubernetes: no kubectl of Debian's")
