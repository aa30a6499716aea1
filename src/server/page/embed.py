#!/usr/bin/python3
"""Writes the files of the status page as the C table that page.h declares: embed.py OUT FILE..."""

import sys
from pathlib import Path

TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8",
         ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}


def c_bytes(data):
    return "\n".join("    " + " ".join(f"{byte}," for byte in data[i:i + 20])
                     for i in range(0, len(data), 20))


def main(out, *names):
    lines = ['#include "server/page.h"', ""]
    table = []
    for number, path in enumerate(map(Path, names)):
        data = path.read_bytes()
        lines += [f"static const unsigned char bytes_{number}[] = {{ /* {path.name} */",
                  c_bytes(data), "};"]
        url = "/" if path.name == "index.html" else f"/{path.name}"
        table.append(f'    {{"{url}", "{TYPES[path.suffix]}", bytes_{number}, sizeof bytes_{number}}},')
    lines += ["", "const struct http_file page_files[] = {", *table, "};",
              "const size_t page_n_files = sizeof page_files / sizeof *page_files;", ""]
    Path(out).write_text("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
