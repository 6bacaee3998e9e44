"""`python -m cvfp pack FILE` and `unpack FILE`: finished runs carried from one store to another."""

from __future__ import annotations

import argparse
from pathlib import Path

from cvfp import cache, packs


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m cvfp", description=__doc__)
    parser.add_argument("command", choices=["pack", "unpack"])
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    try:
        if given.command == "pack":
            print(f"{given.file}: {packs.pack(given.file)} runs")
            return
        new, refused = packs.unpack(given.file)
    except OSError as error:
        parser.error(f"FILE: got {given.file} ({error}); accepted: a file that can be written")
    except ValueError as error:
        parser.error(str(error))
    print(f"{cache.home()}: {new} new runs" + (f"; {refused} entries refused" if refused else ""))


if __name__ == "__main__":
    main()
