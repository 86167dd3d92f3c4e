"""`trimtab verify`: whether a run's certificate still holds; or whether an adapter is what was saved."""

import argparse
from pathlib import Path

from trimtab.commands._parser import add_model
from trimtab.commands._terminal import print_json, terminal

HELP = "verify a run's certificate (its files, and its adapter in a new process), or an adapter folder"
DESCRIPTION = "Exit code 4 if a file has changed, 7 if the adapter behaves differently."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN|ADAPTER", type=Path)
    parser.add_argument("--json", action="store_true", help="print the certificate as JSON")
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    from rich.markup import escape

    from trimtab.certify.certificate import certificate_text, refuse_failed, verify

    certificate = verify(arguments.target, arguments.model)
    if arguments.json:
        print_json(certificate)
    else:
        terminal().print(escape(certificate_text(certificate).rstrip()))
    refuse_failed(certificate, arguments.target)
