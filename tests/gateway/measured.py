"""A gateway as a process of its own, whose memory can be measured: `python -m tests.gateway.measured CLIENT ENDPOINT DATA`.

It prints its port, and serves until its standard input ends.
"""

import sys
from pathlib import Path

from tests.gateway.conftest import CLIENTS, route_to, serving, settings_for


def main() -> None:
    name, endpoint, data = sys.argv[1:]
    (client,) = (known for known in CLIENTS if known == name)
    with serving(settings_for(client, Path(data))) as served:
        served.route_urls(*(route_to(endpoint).endpoints))
        print(served.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
