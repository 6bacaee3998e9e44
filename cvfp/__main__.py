"""`python -m cvfp`: run a preset, list the store's finished runs, carry them to another store."""

from __future__ import annotations

import argparse
from pathlib import Path

import cvfp
from cvfp import cache, config, packs, share

COMMANDS = {
    "run": "a preset with these fields changed; at once where the store has it",
    "results": "the store's finished runs; a field given twice: either value",
    "pack": "the store's finished runs into one file",
    "unpack": "a pack's runs into the store",
}
FIGURES = ["train_tokens", "val_ppl", "trigram_both_ppl", "val_er"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m cvfp", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in COMMANDS.items():
        command = commands.add_parser(name, help=words, description=words)
        if name == "run":
            command.add_argument("preset", metavar="PRESET", help=", ".join(config.PRESETS))
        if name in ("run", "results"):
            command.add_argument("fields", metavar="field=value", nargs="*", type=_field)
        else:
            command.add_argument("file", metavar="FILE", type=Path)
    given = parser.parse_args()
    try:
        if given.command == "run":
            if len(fields := dict(given.fields)) < len(given.fields):
                parser.error(f"fields: got {given.fields}; accepted: each once")
            one = cvfp.Experiment.preset(given.preset, **fields)
            results = cvfp.Results([cvfp.run(one)])
            if not share.started().rank:  # one of several devices tells
                _show(results)
        elif given.command == "results":
            said = given.fields
            _show(cvfp.results(**{k: [x for n, x in said if n == k] for k, _ in said}))
        elif given.command == "pack":
            print(f"{given.file}: {packs.pack(given.file)} runs")
        else:
            new, refused = packs.unpack(given.file)
            words = f"; {refused} entries refused" if refused else ""
            print(f"{cache.home()}: {new} new runs{words}")
    except OSError as error:
        if "file" not in given:
            raise
        why = error.strerror or error
        parser.error(f"FILE: got {given.file} ({why}); accepted: a file that can be written")
    except cvfp.ParameterError as error:
        parser.error(str(error))


def _show(results: cvfp.Results) -> None:
    frame = results.frame().reindex(columns=["key", *config.HINTS, *FIGURES])
    differ = [name for name in config.HINTS if frame[name].nunique(dropna=False) > 1]
    print(frame[["key", *differ, *FIGURES]].to_string(index=False) if results else "no such runs")


def _field(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {word!r}; accepted: field=value, as samples=50")
    return name, value


if __name__ == "__main__":
    main()
