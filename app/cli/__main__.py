"""``python -m app.cli``: the ``frontline`` command without an installation."""

from app.cli.main import main

main(prog_name="frontline")
