"""The lab without the command line's packages: `python -m benchmarks.lab.__main__ '{"preset": "micro", "jobs": 8}'`.

The one argument is a JSON object with the settings of `endprompt lab` by their names.
"""

from __future__ import annotations

import json
import sys

from benchmarks.lab.config import LabConfig
from endprompt.cli import fail, one_line


def main(argv: list[str]) -> int:
    from benchmarks.lab.runner import lab

    try:
        return lab(LabConfig(**json.loads(argv[0] if argv else "{}")))
    except (json.JSONDecodeError, TypeError) as error:
        return fail(f"lab: the argument must be a JSON object of its settings: {one_line(error)}", 2)
    except (ValueError, OSError, ImportError) as error:
        return fail(f"lab: {one_line(error)}", 1)
    except KeyboardInterrupt:
        return fail("lab: interrupted; the same command goes on where it was", 130)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
