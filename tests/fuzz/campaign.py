"""One target, fuzzed with coverage feedback (atheris) for a number of seconds.

Arguments: target, seconds, folder of the corpus.  libFuzzer tells its progress on stderr; a finding
ends the process, leaves its input in the folder above the corpus, and gives a traceback.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    import atheris  # of the extra `fuzz`; collecting the tests must do without it

    name, seconds, corpus = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    with atheris.instrument_imports(include=["prefixcache", "prefixcache_bench"]):
        from fuzz.seeds import seeds
        from fuzz.targets import TARGETS
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    target = TARGETS[name]()
    options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=8192", "-timeout=20"]
    options += [f"-artifact_prefix={corpus.parent}/{name}-", "-rss_limit_mb=3000"]
    known = Path(__file__).parent / "corpus" / name
    folders = [str(corpus), *([str(known)] if known.is_dir() else [])]
    atheris.Setup([sys.argv[0], *options, *folders], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
