"""Lets this folder run alone with the options and fixtures all tests share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.fixtures import *  # noqa: E402,F401,F403
