#!/usr/bin/python3
"""Writes files, syncs each, and notes in another place what has been synced. Runs in the guest.

  writer.py run FOLDER NOTES NUMBER   until NOTES/stop is there; then all it synced is in
                                      NOTES/NUMBER, and NOTES/NUMBER.count has a byte for each sync
  writer.py check FOLDER NOTES        every file is as it was noted

An error of any call ends it with a traceback and no notes.
"""

import hashlib
import json
import os
import random
import sys
from pathlib import Path


def run(folder, notes, number):
    rng = random.Random(number)
    place = folder / number
    place.mkdir()
    directory = os.open(place, os.O_RDONLY)
    synced, log_hash, log_bytes = {}, hashlib.sha256(), 0
    with open(notes / f"{number}.count", "wb", buffering=0) as count, \
         open(place / "log", "ab", buffering=0) as log:
        turn = 0
        while not (notes / "stop").exists():
            # A new version of one of a few files, put in place of the old one.
            data = rng.randbytes(rng.choice((1, 4096, 70000, 1 << 20)))
            name = f"file{rng.randrange(12)}"
            with open(place / "new", "wb", buffering=0) as f:
                f.write(data)
                os.fsync(f.fileno())
            os.rename(place / "new", place / name)
            os.fsync(directory)
            synced[f"{number}/{name}"] = [len(data), hashlib.sha256(data).hexdigest()]
            # A file that stays as it is: what was lost of it nobody writes again.
            data, name = rng.randbytes(rng.choice((4096, 30000))), f"once{turn}"
            with open(place / name, "wb", buffering=0) as f:
                f.write(data)
                os.fsync(f.fileno())
            os.fsync(directory)
            synced[f"{number}/{name}"] = [len(data), hashlib.sha256(data).hexdigest()]
            # And a log that only grows.
            line = f"{turn} {name} {len(data)}\n".encode()
            log.write(line)
            os.fdatasync(log.fileno())
            log_hash.update(line)
            log_bytes += len(line)
            synced[f"{number}/log"] = [log_bytes, log_hash.hexdigest()]
            count.write(b".")
            turn += 1
    (notes / number).write_text(json.dumps(synced))


def check(folder, notes):
    files = 0
    for note in notes.iterdir():
        if note.suffix or note.name == "stop":
            continue
        for name, (size, digest) in json.loads(note.read_text()).items():
            data = (folder / name).read_bytes()
            assert len(data) == size, f"{name} has {len(data)} bytes, not {size}"
            assert hashlib.sha256(data).hexdigest() == digest, f"{name} holds something else"
            files += 1
    print(files)


if sys.argv[1] == "run":
    run(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
else:
    check(Path(sys.argv[2]), Path(sys.argv[3]))
