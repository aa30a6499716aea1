"""Libraries that do something wrong in whichever program they are loaded into."""

import os
import subprocess


def planted_library(folder, code, *options):
    """The path of a library made of `code`, for LD_PRELOAD."""
    source, out = folder / "planted.c", folder / "planted.so"
    source.write_text(code)
    subprocess.run([*os.environ.get("CC", "cc").split(), "-g", "-O0", *options, "-shared", "-fPIC",
                    "-o", out, source, "-lpthread"], check=True)
    return str(out)
