"""Who listens on which address, as `ss -ltnp` tells it."""

import re
import subprocess
from collections.abc import Iterable, Sequence


def listening(pids: Iterable[int], *, prefix: Sequence[str] = ()) -> dict[int, set[str]]:
    """Addresses, without ports, on which processes listen. prefix: words that enter another host's network."""
    wanted = set(pids)
    text = subprocess.run([*prefix, "ss", "-H", "-l", "-t", "-n", "-p"], capture_output=True, text=True, check=True).stdout
    found: dict[int, set[str]] = {}
    for line in text.splitlines():
        address = line.split()[3].rpartition(":")[0].strip("[]")
        for pid in map(int, re.findall(r"pid=(\d+)", line)):
            if pid in wanted:
                found.setdefault(pid, set()).add(address.removeprefix("::ffff:"))
    return found
