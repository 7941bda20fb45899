"""The one error that the host agent's parts raise for its operators."""


class OperatorError(Exception):
    """Something an operator can put right. The message is one line that says what, where and what to do next, and never
    holds a secret. The command line prints it and nothing else."""
