"""`make fuzz`: one reader under bytes that atheris makes, for some seconds: `READER SECONDS`.

Runs in an environment with atheris, which need not have torch. Ends with 1 where the reader crashes, raises what is not
ours, or takes more than 512 MiB.
"""

import importlib
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BOUND_MIB = 512


def main(name: str, seconds: str) -> None:
    atheris: Any = importlib.import_module("atheris")
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    with atheris.instrument_imports(include=["brim"]):
        readers: Any = importlib.import_module("tests.fuzz.readers")
    with TemporaryDirectory() as there:
        place, corpus = Path(there) / "place", Path(there) / "corpus"
        place.mkdir()
        corpus.mkdir()
        (corpus / "seed").write_bytes(readers.SEEDS[name])
        limits = [f"-max_total_time={seconds}", f"-rss_limit_mb={BOUND_MIB}", "-max_len=4096", "-print_final_stats=1"]
        # libFuzzer ends the process by itself, so what it leaves is a directory of the system's for such.
        atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={ROOT}/fuzz-{name}-", str(corpus)],
                      lambda content: readers.READERS[name](content, place))  # fmt: skip
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
