"""A Hub on this machine, until it is interrupted:

    PYTHONPATH=tests/helpers python -m hub_server --folder /tmp/hub
    PYTHONPATH=tests/helpers python -m hub_server --folder /tmp/hub --port 8400 gc=lazy cdn_ttl=60

While it runs, switches are set with `curl -X POST $HF_ENDPOINT/_faults -d '{"gc": "eager"}'`, and read with a GET.
"""

import argparse
import json
import shlex
import signal
import tempfile
import threading
from pathlib import Path

from .server import start


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hub_server", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the repositories lie (default: a new temporary folder)")
    parser.add_argument("--port", type=int, default=0, help="of the first origin (default: a free one)")
    parser.add_argument("--xet", action="store_true", help="print the lines for a client that uses Xet")
    parser.add_argument("--json", action="store_true", help="print one line of JSON in place of the export lines")
    parser.add_argument("faults", nargs="*", metavar="SWITCH=VALUE", help="a switch of hub_server.Faults")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="hub-"))
    server = start(folder, arguments.port, **dict(switch.split("=", 1) for switch in arguments.faults))
    variables = server.variables(folder / "home", xet=arguments.xet)
    if arguments.json:
        lines = [json.dumps(variables)]
    else:
        lines = [f"# A Hub at {server.endpoint}, kept in {folder}. In another terminal:"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
        lines += ["# Other tokens: hf_reader (the owner's, may not write), hf_stranger. Ctrl-C ends it."]
    print("\n".join(lines), flush=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    server.stop()


if __name__ == "__main__":
    main()
