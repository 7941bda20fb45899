"""Runs those end-to-end tests of the Python library `kubernetes` that its package ships (its dynamic client's), against
the cluster of `$KUBECONFIG`, and prints what came of each.

The other tests of the library are in its repository only, as is the module that says where the cluster is: that is made
here. Blind spot: some fail in front of any server of today, since they ask for API versions that are gone.
"""

from __future__ import annotations

import sys
import types
import unittest

from kubernetes.client import Configuration
from kubernetes.config import load_kube_config

MODULES = ("kubernetes.dynamic.test_client", "kubernetes.dynamic.test_discovery")


def configuration() -> Configuration:
    made = Configuration()
    load_kube_config(client_configuration=made)
    return made


class Told(unittest.TestResult):
    """One line for each test; why one failed has too much in it that is another each time."""

    def addSuccess(self, test: unittest.TestCase) -> None:
        print("passed", test.id())

    def addFailure(self, test: unittest.TestCase, err: object) -> None:
        print("failed", test.id())

    def addError(self, test: unittest.TestCase, err: object) -> None:
        print("failed", test.id())

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        print("skipped", test.id(), reason)


def main() -> None:
    package, base = types.ModuleType("kubernetes.e2e_test"), types.ModuleType("kubernetes.e2e_test.base")
    base.get_e2e_configuration = configuration  # type: ignore[attr-defined]
    package.base = base  # type: ignore[attr-defined]
    sys.modules.update({package.__name__: package, base.__name__: base})
    unittest.defaultTestLoader.loadTestsFromNames(MODULES).run(Told())


if __name__ == "__main__":
    main()
