"""Starts vLLM's part on a node without its HTTP server, as ``vllm serve --headless`` does.

Runs under the engine's interpreter, where Frontline is not installed. It replaces the ``vllm``
script, which looks for a distribution named vllm; the CPU build has another name.
"""

from __future__ import annotations

import argparse

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main() -> None:
    parser = FlexibleArgumentParser()
    commands = parser.add_subparsers(dest="subparser", parser_class=FlexibleArgumentParser)
    serve = ServeSubcommand()
    serve.subparser_init(commands)
    arguments: argparse.Namespace = parser.parse_args()
    serve.validate(arguments)
    serve.cmd(arguments)


if __name__ == "__main__":
    main()
