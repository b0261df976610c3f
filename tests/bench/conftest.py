"""`pytest` alone does not put the checkout on the path, where `bench` is."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
