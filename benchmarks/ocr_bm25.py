"""What to pick instead of the demo's model on clean printed pages: BM25 over OCR, or over the text.

    colfolio prepare colfolio/demo/documents --out PAGES --view page --split test
    python benchmarks/ocr_bm25.py PAGES

Every query of the split is put to BM25 over the text that tesseract reads from the page images,
and to BM25 over the text layer of the PDFs that the pages were rendered from. Queries, candidates,
judgements and metrics are those of `colfolio evaluate`. Writes `benchmarks/results/ocr_bm25.json`
and prints the table that stands in `docs/benchmarks.md`. It needs `pip install bm25s`, and
tesseract with its English model (Debian: `apt-get install tesseract-ocr tesseract-ocr-eng`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import bm25s
import pypdfium2
import torch
from demo import commit, machine
from jaxtyping import Float32
from torch import Tensor

from colfolio.data.dataset import Corpus, RetrievalDataset, load_dataset
from colfolio.evaluation import bootstrap_interval, chance, per_query, ranks, relevance_of

RESULTS = Path(__file__).parent / "results" / "ocr_bm25.json"
DOCUMENTS = Path(__file__).parents[1] / "colfolio" / "demo" / "documents"
METRICS = ("ndcg@5", "recall@1")
K1, B = 1.5, 0.75
PAGES_A_CALL = 16


@dataclass(frozen=True, slots=True)
class OcrSpeed:
    """How long tesseract took.

    Args:
        processes: calls that run at once, one thread each.
        wall_seconds: from the first call to the last, with the load that the machine had.
        cpu_seconds: of all calls together.
        load: mean number of running processes of the machine in the last minute of the work.
    """

    processes: int
    pages: int
    wall_seconds: float
    cpu_seconds: float
    load: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", type=Path, help="dataset of whole pages")
    parser.add_argument("--split", default="test")
    parser.add_argument("--documents", type=Path, default=DOCUMENTS, help="the pages' PDFs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    version = tesseract_version()
    dataset = load_dataset(arguments.pages, arguments.split)
    layers = text_layers(dataset.corpus, arguments.documents)
    texts, speed = read_pages(dataset.corpus, arguments.processes)
    record = {
        "machine": machine(),
        "commit": commit(),
        "tesseract": version,
        "bm25": {"library": f"bm25s {bm25s.__version__}", "k1": K1, "b": B},
        "split": dataset.split,
        "fingerprint": dataset.fingerprint,
        "queries": len(dataset.queries),
        "pages": len(dataset.corpus),
        "ocr": asdict(speed),
        "ocr_bm25": measure(dataset, texts),
        "text_layer_bm25": measure(dataset, layers),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    print(table(record))


def tesseract_version() -> str:
    """Version of tesseract, once it is sure that it reads English."""
    if shutil.which("tesseract") is None:
        sys.exit("tesseract is not installed; Debian: apt-get install tesseract-ocr")
    if "eng" not in _output("tesseract", "--list-langs").split():
        sys.exit("tesseract has no English model; Debian: apt-get install tesseract-ocr-eng")
    return _output("tesseract", "--version").split()[1]


def read_pages(corpus: Corpus, processes: int) -> tuple[list[str], OcrSpeed]:
    """What tesseract reads on each page, `processes` calls of some pages each at a time."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{row}.image" for row in range(len(corpus))]
        for row, path in enumerate(paths):
            path.write_bytes(corpus.encoded(row))
        parts = [paths[i : i + PAGES_A_CALL] for i in range(0, len(paths), PAGES_A_CALL)]
        start, start_cpu = time.perf_counter(), _child_seconds()
        with ThreadPoolExecutor(processes) as pool:
            texts = [text for part in pool.map(_read_part, parts) for text in part]
        wall, cpu = time.perf_counter() - start, _child_seconds() - start_cpu
    return texts, OcrSpeed(processes, len(corpus), wall, cpu, os.getloadavg()[0])


def text_layers(corpus: Corpus, root: Path) -> list[str]:
    """The text layer of each page, from the PDFs below `root`."""
    texts = []
    for name, page in zip(corpus.documents, corpus.pages, strict=True):
        if not (root / name).is_file():
            sys.exit(f"no document {name} below {root}: name the folder of the PDFs (--documents)")
        with pypdfium2.PdfDocument(root / name) as document:
            texts.append(document[page].get_textpage().get_text_range())
    return texts


def measure(dataset: RetrievalDataset, texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Each metric of BM25 over the pages' texts: mean, 95 % interval, chance."""
    ranked = ranks(bm25_scores(dataset, texts), relevance_of(dataset))
    values = torch.stack([per_query(ranked, name) for name in METRICS], dim=1)
    low, high = bootstrap_interval(values)
    return {
        name: {
            "value": float(values[:, column].mean()),
            "low": float(low[column]),
            "high": float(high[column]),
            "chance": float(chance(ranked, name).mean()),
        }
        for column, name in enumerate(METRICS)
    }


def bm25_scores(
    dataset: RetrievalDataset, texts: Sequence[str]
) -> Float32[Tensor, "queries pages"]:
    """BM25 as Lucene has it: no weight below 0, no stop words, no stemming."""
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index([tokens_of(text) for text in texts], show_progress=False)
    scores = torch.zeros(len(dataset.queries), len(texts))
    for row, query in enumerate(dataset.queries):
        known = [token for token in tokens_of(query.text) if token in index.vocab_dict]
        if known:
            scores[row] = torch.from_numpy(index.get_scores(known))
    return scores


def tokens_of(text: str) -> list[str]:
    """Runs of letters and digits in lower case, words that a line end divides joined again."""
    # PDFium marks the hyphen of a divided word as U+0002 or U+FFFE
    text = re.sub(r"(?<=\w)(?:-[\r\n]+|[\x02\ufffe][\r\n]*)(?=\w)", "", text)
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


def table(record: dict) -> str:
    ocr = OcrSpeed(**record["ocr"])
    speed = f"{ocr.pages / ocr.wall_seconds:.1f} ({ocr.pages / ocr.cpu_seconds:.1f} a CPU second)"
    rows = {
        f"tesseract {record['tesseract']}, BM25": (record["ocr_bm25"], speed),
        "the PDF's own text, BM25": (record["text_layer_bm25"], "nothing to read"),
    }
    lines = ["| pages by | nDCG@5 | recall@1 | chance, nDCG@5 | OCR, pages a second |"]
    lines.append("|---" * 5 + "|")
    for system, (metrics, pages_a_second) in rows.items():
        cells = [_cell(metrics[name]) for name in METRICS]
        cells += [f"{metrics['ndcg@5']['chance']:.4f}", pages_a_second]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        f"{record['queries']} titles over {record['pages']} pages; OCR processes: {ocr.processes}; "
        f"load of the machine {ocr.load:.1f}."
    )
    return "\n".join(lines)


def _cell(metric: dict[str, float]) -> str:
    return f"{metric['value']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})"


def _read_part(paths: Sequence[Path]) -> list[str]:
    """What one call of tesseract reads on some pages."""
    command = ["tesseract", "stdin", "stdout", "-l", "eng"]
    listing = "".join(f"{path}\n" for path in paths)
    done = subprocess.run(
        command,
        input=listing,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_THREAD_LIMIT": "1"},
    )
    texts = done.stdout.split("\f")  # between pages, in some versions behind the last one too
    if len(texts) == len(paths) + 1 and not texts[-1]:
        texts.pop()
    if done.returncode or len(texts) != len(paths):
        raise RuntimeError(
            f"tesseract ended with {done.returncode} after {len(texts)} of {len(paths)} pages: "
            f"{done.stderr[-500:]}"
        )
    return texts


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
