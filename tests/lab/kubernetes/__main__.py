"""Makes the programs of the Kubernetes laboratory where they are absent, as the first test that needs them would."""

import sys

from tests.lab.kubernetes.binaries import GoMissing, binaries

try:
    print(binaries().directory)
except GoMissing as error:
    sys.exit(f"kubernetes: {error}")
