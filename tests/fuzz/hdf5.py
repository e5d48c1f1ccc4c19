"""`make fuzz`: HDF5 files with some bytes changed, for some seconds: `SECONDS`.

Each is read as `brim quantize` reads it: the HDF5 library in a process of its own, which may crash. Prints what came of
them; ends with an exception where something else than a refusal did.
"""

import random
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from brim.checkpoints.hdf5 import datasets
from brim.errors import ModelFileError

SEED = Path(__file__).resolve().parents[1] / "cpu" / "checkpoints" / "data" / "keras" / "gpt2" / "tf_model.h5"


def damaged(content: bytes, chance: random.Random) -> bytes:
    """With up to eight changed bytes, most of them where there are others than zeros; now and then cut."""
    changed = bytearray(content)
    told = [place for place, byte in enumerate(content) if byte]
    for _ in range(chance.randint(1, 8)):
        changed[chance.choice(told)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
    return bytes(changed[: chance.randrange(len(changed))] if chance.random() < 0.1 else changed)


def main(seconds: float) -> None:
    chance, content, seen = random.Random(0), SEED.read_bytes(), Counter[str]()
    until = time.monotonic() + seconds
    with TemporaryDirectory() as place:
        path = Path(place) / "model.h5"
        while time.monotonic() < until:
            path.write_bytes(damaged(content, chance))
            try:
                datasets(path)
                seen["read"] += 1
            except ModelFileError as error:
                seen["the library crashed"] += "fails on it" in str(error)
                seen["refused"] += 1
    print(dict(seen))


if __name__ == "__main__":
    main(float(sys.argv[1]))
