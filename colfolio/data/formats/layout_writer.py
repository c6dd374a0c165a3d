"""Tables written in the ViDoRe/BEIR layout, and the README that tells where they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from colfolio.data.formats.layout import (
    CONFIGS,
    TEACHER,
    file_of,
    ordered,
    read_readme,
    schema_of,
)
from colfolio.data.formats.staging import Staging
from colfolio.errors import DatasetError

_SPLIT_NAME = re.compile(r"\w+(\.\w+)*")


def stage_split(
    staging: Staging,
    split: str,
    corpus: Iterable[pa.Table],
    queries: pa.Table,
    qrels: pa.Table,
    teacher: pa.Table | None = None,
) -> None:
    """Write the tables of a split aside; the corpus comes in pieces and is streamed.

    Raises:
        DatasetError: `datasets` would refuse the name of the split.
    """
    if not _SPLIT_NAME.fullmatch(split):
        raise DatasetError(f"{split!r} cannot name a split; use letters, digits and _")
    schema = schema_of("corpus")
    leaves = {"image.bytes": "NONE"}  # PNG and JPEG are compressed already
    others = ["corpus-id", "image.path", "doc-id", "page-number", "box.list.element", "kind"]
    compression = leaves | dict.fromkeys(others, "ZSTD")
    with pq.ParquetWriter(
        staging.path(file_of("corpus", split)),
        schema,
        compression=compression,  # pyright: ignore[reportArgumentType]
        use_dictionary=["doc-id", "kind"],  # pyright: ignore[reportArgumentType]
        write_statistics=False,  # pyright: ignore[reportArgumentType]
    ) as writer:
        for table in corpus:
            writer.write_table(_conform(table, "corpus"))
    for config, table in (("queries", queries), ("qrels", qrels), (TEACHER, teacher)):
        if table is not None:
            pq.write_table(
                _conform(table, config), staging.path(file_of(config, split)), compression="ZSTD"
            )


def stage_readme(staging: Staging, splits: Sequence[str], scored: Sequence[str] = ()) -> None:
    """Write a README whose `configs:` name the files of these splits; keep what else it says.

    Args:
        scored: the splits that have teacher scores.
    """
    existing = staging.folder / "README.md"
    matter, body = read_readme(existing) if existing.exists() else ({}, _README_BODY)
    splits_of = dict.fromkeys(CONFIGS, splits) | ({TEACHER: scored} if scored else {})
    matter["configs"] = [
        {
            "config_name": config,
            "data_files": [
                {"split": split, "path": file_of(config, split)} for split in ordered(named)
            ],
        }
        for config, named in splits_of.items()
    ]
    front = yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)
    staging.path("README.md").write_text(f"---\n{front}---\n{body}", encoding="utf-8")


_README_BODY = """
# Page images and queries

Written by `colfolio prepare` in the ViDoRe/BEIR layout. `corpus` holds the images with their
document, page (counted from 0) and box (left, top, right, bottom as fractions of the page);
`queries` the texts; `qrels` which image answers which query.

```python
from datasets import load_dataset
corpus = load_dataset("path/to/this/folder", "corpus", split="test")
```
"""


def _conform(table: pa.Table, config: str) -> pa.Table:
    """The table with every column of the layout, in order, missing ones null."""
    schema = schema_of(config)
    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
