"""The options of `moelab data ...`."""

from __future__ import annotations

from moelab.cli import words


def declare(data) -> None:
    """Adds the commands to the group."""
    for name, text in (
        ("build", "build the data"),
        ("show", "describe the data; built first if need be"),
    ):
        words.add(data, name, f"data:{name}", text, words.takes_config)
    text = "kinds of dirt and filters, with their fields"
    words.add(data, "tools", "data:tools", text)
    text = "let filters judge all training documents, each alone; nothing is removed"
    score = words.add(data, "score", "data:score", text, words.takes_config)
    text = "build the data with filters, and say what each removed"
    chain = words.add(data, "filter", "data:filter", text, words.takes_config)
    for command in (score, chain):
        command.add_argument(
            "--tool",
            action="append",
            default=[],
            metavar="'KIND FIELD=VALUE'",
            help="instead of those of config.data.filter; repeat for more",
        )
    score.add_argument(
        "--out", metavar="FILE", default="", help="every document: FILE.csv, .jsonl or .parquet"
    )
    chain.add_argument(
        "--out", metavar="FILE", default="", help="text that stays: FILE.jsonl or .jsonl.gz"
    )
