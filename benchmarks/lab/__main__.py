"""The lab without the command line's packages: `python -m benchmarks.lab.__main__ '{"preset": "micro", "jobs": 8}'`.

The one argument is a JSON object with the settings of `endprompt lab` by their names.
"""

from __future__ import annotations

import json
import sys

from benchmarks.lab.config import LabConfig


def main(argv: list[str]) -> int:
    from benchmarks.lab.runner import lab

    try:
        given = json.loads(argv[0]) if argv else {}
        return lab(LabConfig(**given))
    except json.JSONDecodeError as error:
        print(f"endprompt lab: the argument must be a JSON object ({error.msg})", file=sys.stderr)
        return 2
    except TypeError as error:
        print(f"endprompt lab: {str(error).rpartition(') ')[2]}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError) as error:
        print(f"endprompt lab: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("endprompt lab: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
