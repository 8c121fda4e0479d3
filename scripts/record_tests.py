"""Writes a record of a test run: how many tests passed, what failed, what was skipped and why.

python scripts/record_tests.py runs/tests.xml runs/tests.json
"""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from dlp_lora.files import write_json
from dlp_lora.lab.records.environment import environment


def record(xml: Path) -> dict[str, object]:
    """Reads a JUnit file as pytest writes it."""
    cases = list(ElementTree.parse(xml).getroot().iter("testcase"))
    name = {id(case): f"{case.get('classname')}.{case.get('name')}" for case in cases}
    failed = [name[id(case)] for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = Counter(str(skip.get("message")) for case in cases for skip in case.findall("skipped"))
    return {
        "passed": len(cases) - len(failed) - sum(skipped.values()),
        "failed": failed,
        "skipped": dict(skipped.most_common()),
        "seconds": round(sum(float(case.get("time", 0)) for case in cases), 1),
        "environment": environment(),
    }


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    found = record(source)
    write_json(target, found, indent=2)
    print(
        f"{found['passed']} passed, {len(found['failed'])} failed, {sum(found['skipped'].values())} skipped: {target}"
    )
    sys.exit(bool(found["failed"]))
