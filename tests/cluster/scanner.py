"""Which TCP ports of an address accept connections: a program, to be run where a stranger would stand.

Run:  python tests/cluster/scanner.py ADDRESS [ADDRESS...]
It prints one JSON object: address -> {"open": [ports], "refused": how many, "silent": how many that did not answer}.
"""

import asyncio
import json
import sys
from collections import Counter
from typing import Any

PORTS = range(1, 2**16)
AT_ONCE = 400
TIMEOUT_S = 30.0  # a host that is there answers at once; this one may be slow to look
OPEN, REFUSED, SILENT = "open", "refused", "silent"


async def scan(address: str) -> dict[str, Any]:
    """Knock at every port of an IPv4 address, or of an IPv6 one, `fe80::1%eth0`."""
    ports, answers, found = iter(PORTS), Counter[str](), []

    async def knock_on() -> None:
        for port in ports:
            answer = await knock(address, port)
            answers[answer] += 1
            if answer == OPEN:
                found.append(port)

    await asyncio.gather(*(knock_on() for _ in range(AT_ONCE)))
    return {OPEN: sorted(found), REFUSED: answers[REFUSED], SILENT: answers[SILENT]}


async def knock(address: str, port: int) -> str:
    """What becomes of a connection."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), TIMEOUT_S)
    except ConnectionRefusedError:
        return REFUSED
    except OSError:  # a timeout among them
        return SILENT
    writer.close()
    return OPEN


if __name__ == "__main__":
    print(json.dumps({address: asyncio.run(scan(address)) for address in sys.argv[1:]}))
