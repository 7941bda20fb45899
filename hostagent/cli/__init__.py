"""The command `hopgate`: one file a verb. Exit status 0 for yes, 1 for no or an error, 2 for a wrong call.

A verb imports what it needs when it runs, so that `hopgate approve` starts quickly.
"""

from __future__ import annotations

import os
import sys

import typer

from hostagent.cli import (
    approvals,
    audit,
    cleanup,
    doctor,
    kubeconfig,
    metrics,
    policy,
    reload,
    replay,
    run,
    sessions,
    status,
)
from hostagent.cli import exec as declared
from hostagent.errors import OperatorError

app = typer.Typer(
    name="hopgate",
    help="A host gateway: every hop of the process lineage is held against the policy, for every operation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("exec", context_settings={"allow_interspersed_args": False})(declared.execute)
app.command("cleanup")(cleanup.cleanup)
app.command("reload")(reload.reload)
app.command("status")(status.status)
app.command("metrics")(metrics.metrics)
app.command("doctor")(doctor.doctor)
app.command("kubeconfig")(kubeconfig.kubeconfig)
app.command("sessions")(sessions.sessions)
app.command("replay")(replay.replay)
app.command("approvals")(approvals.approvals)
app.command("approve")(approvals.approve)
app.command("deny")(approvals.deny)
app.add_typer(audit.app, name="audit")
app.add_typer(policy.app, name="policy")


def main() -> None:
    """The console script. What an operator can put right is one line on standard error and never a traceback."""
    try:
        app()
    except OperatorError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # whoever read our output has seen enough; what is still buffered must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
