"""Parquet: a document per row of a column of strings. Memory: one row group."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megamask.data.formats.fields import missing_column, text_field
from megamask.data.formats.lines import BadDocument, ByteStream, SubsetText


def read_parquet(
    path: Path, file: ByteStream, field: str, split_by: str | None = None
) -> Iterator[str | SubsetText | BadDocument]:
    """The column ``field`` of each row, and that of ``split_by``."""
    import pyarrow
    from pyarrow import parquet

    with tempfile.TemporaryFile() as plain:
        if not path.name.lower().endswith(".parquet"):
            # parquet is read from its end, so it needs a seekable file
            shutil.copyfileobj(file, plain)
            file = plain
        try:
            table = parquet.ParquetFile(file)
            columns = {"text_field": field} | ({"split_by": split_by} if split_by else {})
            for setting, name in columns.items():
                times = table.schema_arrow.names.count(name)
                if not times:
                    yield missing_column(path, name, table.schema_arrow.names, setting=setting)
                    return
                if times > 1:
                    yield BadDocument(f"{path} has {times} columns {name!r}. Rename all but one.", ends_file=True)
                    return
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[*columns.values()]):
                for record in batch.to_pylist():
                    row += 1
                    yield text_field(f"{path}, row {row}", record, field, split_by)
        except (pyarrow.ArrowException, OSError) as error:
            yield BadDocument(f"{path} is corrupt or truncated: {str(error).splitlines()[0]}.", ends_file=True)
