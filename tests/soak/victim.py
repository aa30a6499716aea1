"""A client in a process of its own, for soak.py to kill: sends the requests that stand on its
input, a few in flight, and says on its output when each was sent and answered."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import rawnbd  # noqa: E402
from harness.load import FLUSH, WRITE, Op, content  # noqa: E402

DEPTH = 4


def main():
    told = json.load(sys.stdin)
    address = told["address"] if isinstance(told["address"], str) else tuple(told["address"])
    client = rawnbd.connect(None, told["volume"], address=address)
    waiting = []
    for fields in told["ops"]:
        op = Op(**fields)
        data = content(op.number, op.offset, op.offset + op.length) if op.kind == WRITE else b""
        print(f"s {op.number}", flush=True)
        flags = (rawnbd.FLAG_FUA if op.fua else 0) | (rawnbd.FLAG_NO_HOLE if op.no_hole else 0)
        offset = 0 if op.kind == FLUSH else told["base"] + op.offset
        waiting.append((op.number, client.request(op.kind, offset, op.length, flags, data)))
        if len(waiting) > DEPTH:
            answer(client, *waiting.pop(0))
    for one in waiting:
        answer(client, *one)


def answer(client, number, cookie):
    result = client.result(cookie)
    print(f"a {number} {result.answered_ns} {result.error}", flush=True)


main()
