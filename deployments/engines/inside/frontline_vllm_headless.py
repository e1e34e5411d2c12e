"""Starts the part of vLLM that runs on a node without its HTTP server: ``vllm serve --headless``.

Runs under the engine's interpreter, where Frontline is not installed. The ``vllm`` script itself
looks for a distribution of that name, which vLLM's CPU build is not.
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
