"""`python -m tests.lab.bench [kernel | kubernetes] ...`."""

import sys

from tests.lab.bench import kernel, kubernetes, postgres

BENCHES = {"kernel": kernel.main, "kubernetes": kubernetes.main}

if __name__ == "__main__":
    words = sys.argv[1:]
    bench = BENCHES.get(words[0]) if words else None
    sys.exit(bench(words[1:]) if bench is not None else postgres.main(words))
