"""Known vulnerabilities of the installed packages, by pip-audit: `python .ci/audit_packages.py PIP_AUDIT`.

pip-audit ends with success for packages that its service does not know, even if that is all of them (an index without
advisories, a mirror). Here that is said. Exit codes: 0 no vulnerability found, 1 found, 2 nothing could be checked.
"""

from __future__ import annotations

import json
import subprocess
import sys


def main(argv: list[str]) -> int:
    command = [*argv, "--skip-editable", "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"the advisory service gave no answer: {done.stderr.strip() or done.stdout.strip()}", file=sys.stderr)
        return 2
    checked = [package for package in packages if "skip_reason" not in package]
    unchecked = [package["name"] for package in packages if "skip_reason" in package]
    found = [(package, fault) for package in checked for fault in package["vulns"]]
    for package, fault in found:
        mended = ", ".join(fault["fix_versions"]) or "no release yet"
        print(f"{package['name']} {package['version']}: {fault['id']}, mended in {mended}")
    if unchecked:
        print(f"not checked, the service does not know them: {', '.join(unchecked)}", file=sys.stderr)
    if not checked:
        print("no package could be checked: is this an index without advisories, or a mirror?", file=sys.stderr)
        return 2
    print(f"{len(checked)} packages checked, {len(found)} known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
