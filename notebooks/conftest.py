"""nbval with a history of the cells that ran, as in Jupyter and papermill.

`cvfp.notebook.given` reads from it what the parameters cell sets; nbval asks kernels to keep none,
and then a notebook's sizes would be the preset's, not its own.
"""

from __future__ import annotations

from nbval.kernel import RunningKernel


def execute(self: RunningKernel, source: str, allow_stdin: bool | None = None) -> str:
    reply: str = self.kc.execute(source, allow_stdin=allow_stdin, stop_on_error=False)
    return reply


RunningKernel.execute_cell_input = execute
