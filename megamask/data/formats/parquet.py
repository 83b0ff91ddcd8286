"""Parquet: a document per row of a column of strings. Memory: one row group."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megamask.data.formats.fields import missing_column, text_field
from megamask.data.formats.lines import BadDocument, ByteStream


def read_parquet(path: Path, file: ByteStream, field: str) -> Iterator[str | BadDocument]:
    """The column ``field`` of each row."""
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as plain:
        if not path.name.lower().endswith(".parquet"):
            # parquet is read from its end, so it needs a seekable file
            shutil.copyfileobj(file, plain)
            file = plain
        try:
            table = parquet.ParquetFile(file)
            if field not in table.schema_arrow.names:
                yield missing_column(path, field, table.schema_arrow.names)
                return
            times = table.schema_arrow.names.count(field)
            if times > 1:
                yield BadDocument(f"{path} has {times} columns {field!r}. Rename all but one.", ends_file=True)
                return
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield text_field(f"{path}, row {row}", {field: value}, field)
        except (pyarrow.ArrowException, OSError) as error:
            yield BadDocument(f"{path} is corrupt or truncated: {str(error).splitlines()[0]}.", ends_file=True)
