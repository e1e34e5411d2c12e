"""``python -m app.cli``: the ``frontline`` command, where it is not installed."""

from app.cli.main import main

main(prog_name="frontline")
